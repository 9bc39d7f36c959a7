"""FullTextIndex: BM25 as the textbook has it, always in step with the knowledge base."""

from __future__ import annotations

import json
import logging
import math
import random
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from chains import fulltext
from chains.analysis import index_terms
from chains.fulltext import FullTextIndex, IndexBusyError, query_terms
from chains.knowledge_base import KnowledgeBase, SourceState
from chains.knowledge_base_writer import NewChunk, NewDocument

ROOT = Path(__file__).resolve().parents[2]
K1, B = 1.2, 0.75  # tantivy's


@pytest.fixture
def kb(tmp_path: Path) -> Iterator[KnowledgeBase]:
    with KnowledgeBase(tmp_path / "kb", create=True) as knowledge_base:
        yield knowledge_base


def add(kb: KnowledgeBase, source: str, *texts: str) -> list[int]:
    """Store the texts as the chunks of a source; their ids."""
    documents = [
        NewDocument(f"{source}-{n}", "", text, {}, [NewChunk(f"{source}-{n}", 0, len(text), text, {})])
        for n, text in enumerate(texts)
    ]
    writer = kb.writer()
    made = writer.first_generation("fake", np.array([1, 0], np.float32), None)
    state = SourceState(0, 1, 1, source, "s")
    if kb.source_state(source) is not None:  # another text under the same name
        documents = [replace(document, content_hash=document.content_hash + document.text) for document in documents]
    source_id, _ = writer.begin_source(source, state)
    writer.add_documents(source_id, documents)
    writer.activate(source_id, made.id)
    return [int(i) for i in kb.chunk_ids_of(source)]


def remove(kb: KnowledgeBase, *sources: str) -> None:
    kb.writer().remove_sources(sources)


def found(index: FullTextIndex, query: str, k: int = 10) -> list[int]:
    return [chunk for chunk, _ in index.search(query, k)]


def quantised(length: int) -> int:
    """A field length as tantivy's one-byte norm keeps it: exact to 40, then a mantissa of three bits (Lucene's)."""
    if length <= 40:
        return length
    rest = length - 24  # Lucene's SmallFloat.intToByte4: 24 free values, then longs of 4 significant bits
    bits = max(rest.bit_length() - 4, 0)
    return 24 + (rest >> bits << bits)


def plain_bm25(texts: dict[int, str], query: str) -> dict[int, float]:
    """BM25 by its formula (Robertson and Zaragoza 2009, with the idf of Lucene)."""
    counts = {key: Counter(index_terms(text)) for key, text in texts.items()}
    lengths = {key: count.total() for key, count in counts.items()}
    average = sum(lengths.values()) / len(lengths)
    scores = dict.fromkeys(texts, 0.0)
    for word in query_terms(query):
        having = sum(word in count for count in counts.values())
        idf = math.log(1 + (len(texts) - having + 0.5) / (having + 0.5))
        for key, count in counts.items():
            frequency = count[word]
            norm = K1 * (1 - B + B * quantised(lengths[key]) / average)
            scores[key] += idf * frequency * (K1 + 1) / (frequency + norm)
    return {key: score for key, score in scores.items() if score > 0}


# -- ranking -----------------------------------------------------------------------------------------------------


def test_scores_are_plain_bm25(kb: KnowledgeBase) -> None:
    random_ = random.Random(3)
    words = ["劳动", "合同", "工资", "休假", "仲裁", "BGE", "检索", "第3条", "保险"]
    texts = ["，".join(random_.choices(words, k=random_.randrange(1, 60))) for _ in range(120)]
    by_id = dict(zip(add(kb, "s", *texts), texts, strict=True))
    index = FullTextIndex(kb)
    for query in ("劳动合同", "工资", "bge 检索 保险", "休假仲裁第3条", "動合"):
        expected = plain_bm25(by_id, query)
        hits = index.search(query, 200)
        assert {chunk for chunk, _ in hits} == expected.keys()
        for chunk, score in hits:
            assert score == pytest.approx(expected[chunk], rel=0.02)
        assert [score for _, score in hits] == sorted((score for _, score in hits), reverse=True)


def test_a_rare_word_weighs_more_than_a_common_one(kb: KnowledgeBase) -> None:
    ids = add(kb, "s", *["合同条款"] * 20, "仲裁条款")
    assert found(FullTextIndex(kb), "合同仲裁", 1) == [ids[-1]]


def test_a_word_asked_twice_counts_once(kb: KnowledgeBase) -> None:
    add(kb, "s", "合同", "仲裁")
    index = FullTextIndex(kb)
    assert index.search("合同 合同 仲裁", 5) == index.search("合同 仲裁", 5)


def test_equal_scores_come_by_id_also_at_the_cut(kb: KnowledgeBase) -> None:
    index = FullTextIndex(kb)
    for number in range(12):  # each becomes a segment of its own
        add(kb, f"s{number}", *["劳动合同"] * (3 + number))
        index.save_cache()
    everything = found(index, "劳动合同", 500)
    assert everything == kb.chunk_ids().tolist()
    for k in (1, 5, 50):
        assert found(index, "劳动合同", k) == everything[:k]


@pytest.mark.parametrize("query", ["勞動合同", "劳动合同", "ＢＧＥ", "bge", "Bge劳动"])
def test_forms_of_the_same_word_find_each_other(kb: KnowledgeBase, query: str) -> None:
    (wanted, _) = add(kb, "s", "劳动合同与BGE", "毫不相干")
    assert found(FullTextIndex(kb), query) == [wanted]


def test_title_and_headings_are_searched_too(kb: KnowledgeBase) -> None:
    chunk = NewChunk("k", 0, 2, "正文", {"headings": ["考勤制度"]})
    writer = kb.writer()
    made = writer.first_generation("fake", np.array([1, 0], np.float32), None)
    source_id, _ = writer.begin_source("a", SourceState(0, 1, 1, "a", "s"))
    writer.add_documents(source_id, [NewDocument("h", "员工手册", "正文", {}, [chunk])])
    writer.activate(source_id, made.id)
    index = FullTextIndex(kb)
    assert len(found(index, "手册")) == len(found(index, "考勤")) == len(found(index, "正文")) == 1


# -- queries -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("query", ["", "   ", "，。？！", "😀", "\n", "不在里面"])
def test_a_query_without_known_terms_finds_nothing(kb: KnowledgeBase, query: str) -> None:
    add(kb, "s", "合同")
    assert FullTextIndex(kb).search(query, 5) == []


@pytest.mark.parametrize("query", ['"合同" AND (', "text:合同", "合同~2 *", "-合同", "合同\x00"])
def test_a_query_is_words_not_syntax(kb: KnowledgeBase, query: str) -> None:
    ids = add(kb, "s", "合同", "其他")
    assert found(FullTextIndex(kb), query) == ids[:1]


@pytest.mark.parametrize("query", ["合同" + "其他的词语 " * 10_000, "合同 " + "a" * 100_000, "合同" * 50_000])
def test_a_very_long_query_is_answered_quickly(kb: KnowledgeBase, query: str) -> None:
    ids = add(kb, "s", "合同", "仲裁")
    started = time.monotonic()
    assert ids[0] in found(FullTextIndex(kb), query)
    assert time.monotonic() - started < 5


def test_a_very_long_word_can_be_stored(kb: KnowledgeBase) -> None:
    ids = add(kb, "s", "a" * 100_000 + " 合同", "合同")
    assert sorted(found(FullTextIndex(kb), "合同")) == ids


@pytest.mark.parametrize("k", [0, -1, 1, 2, 3, 1000, 10**12])
def test_any_number_of_hits_may_be_asked_for(kb: KnowledgeBase, k: int) -> None:
    add(kb, "s", "合同", "合同合同", "合同法")
    assert len(FullTextIndex(kb).search("合同", k)) == max(0, min(k, 3))


def test_an_empty_knowledge_base_finds_nothing(kb: KnowledgeBase) -> None:
    index = FullTextIndex(kb)
    assert index.search("合同", 5) == []
    index.save_cache()
    ids = add(kb, "s", "合同")
    assert found(index, "合同") == ids


def test_only_allowed_chunks_are_found_however_low_they_rank(kb: KnowledgeBase) -> None:
    ids = add(kb, "s", *["合同"] * 300, "合同" + "其他" * 100)
    index = FullTextIndex(kb)
    assert [chunk for chunk, _ in index.search("合同", 1, np.array([ids[-1]]))] == [ids[-1]]
    assert [chunk for chunk, _ in index.search("合同", 9, np.array([ids[7], ids[3]]))] == [ids[3], ids[7]]
    assert index.search("合同", 5, np.zeros(0, np.int64)) == []
    assert index.search("合同", 5, np.array([10**9])) == []


# -- in step with the knowledge base -----------------------------------------------------------------------------


def test_what_is_added_and_removed_shows_at_the_next_question(kb: KnowledgeBase) -> None:
    index = FullTextIndex(kb)
    first = add(kb, "a", "劳动合同", "工资")
    assert found(index, "合同") == first[:1]
    second = add(kb, "b", "买卖合同")
    assert sorted(found(index, "合同")) == [first[0], *second]
    remove(kb, "a")
    assert found(index, "合同") == second
    assert found(index, "工资") == []
    changed = add(kb, "b", "租赁合同")
    assert found(index, "合同") == changed
    remove(kb, "b")
    assert found(index, "合同") == []


def test_a_staged_source_is_not_found(kb: KnowledgeBase) -> None:
    add(kb, "a", "合同")
    writer = kb.writer()
    source_id, _ = writer.begin_source("b", SourceState(0, 1, 1, "b", "s"))
    writer.add_documents(source_id, [NewDocument("h", "", "仲裁", {}, [NewChunk("b", 0, 2, "仲裁", {})])])
    index = FullTextIndex(kb)
    assert index.search("仲裁", 5) == []
    writer.activate(source_id, 1)
    assert len(index.search("仲裁", 5)) == 1


def test_equal_documents_are_one_hit_until_the_last_of_them_goes(kb: KnowledgeBase) -> None:
    writer = kb.writer()
    made = writer.first_generation("fake", np.array([1, 0], np.float32), None)
    for source in ("a", "b"):
        source_id, _ = writer.begin_source(source, SourceState(0, 1, 1, source, "s"))
        chunk = NewChunk("same", 0, 2, "仲裁", {})
        writer.add_documents(source_id, [NewDocument("same", "", "仲裁", {"source": source}, [chunk])])
        writer.activate(source_id, made.id)
    index = FullTextIndex(kb)
    assert len(found(index, "仲裁")) == 1
    remove(kb, "a")
    assert len(found(index, "仲裁")) == 1
    remove(kb, "b")
    assert found(index, "仲裁") == []


def documents_on_disk(kb: KnowledgeBase) -> tuple[int, int]:
    """(documents in the segments, dead ones too; dead ones), as tantivy's own list of segments has them."""
    (meta,) = (kb.path / "fulltext").glob("*/meta.json")
    segments = json.loads(meta.read_text(encoding="utf-8"))["segments"]
    dead = sum((segment["deletes"] or {"num_deleted_docs": 0})["num_deleted_docs"] for segment in segments)
    return sum(segment["max_doc"] for segment in segments), dead


def test_no_posting_of_a_removed_document_is_left_on_disk(kb: KnowledgeBase) -> None:
    """Deleted documents stay in tantivy's segments, words and all, until these are written anew."""
    add(kb, "a", "绝密", "合同")
    add(kb, "b", *["买卖合同"] * 50)
    index = FullTextIndex(kb)
    index.save_cache()
    assert documents_on_disk(kb) == (52, 0)
    remove(kb, "a")
    index.save_cache()
    assert documents_on_disk(kb) == (50, 0)
    assert len(found(index, "合同", 99)) == 50
    remove(kb, "b")
    index.save_cache()
    assert documents_on_disk(kb) == (0, 0)
    assert found(index, "合同") == []


@pytest.fixture
def as_if_big(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes from which on nothing is written anew just because it is small."""
    monkeypatch.setattr(fulltext, "_REWRITTEN_AT_ONCE", 0)
    monkeypatch.setattr(fulltext, "_COMPACTED_UP_TO", 0)


@pytest.mark.usefixtures("as_if_big")
def test_a_question_waits_only_until_what_was_removed_is_marked(kb: KnowledgeBase) -> None:
    add(kb, "stays", *["合同"] * 85)
    add(kb, "few", *["仲裁"] * 5)
    add(kb, "many", *["工资"] * 60)
    index = FullTextIndex(kb)
    index.save_cache()
    before = folders(kb)
    remove(kb, "few")
    assert found(index, "仲裁") == []
    assert (folders(kb), documents_on_disk(kb)) == (before, (150, 5))
    index.compact()  # 5 of 150: less than a tenth
    assert (folders(kb), documents_on_disk(kb)) == (before, (150, 5))
    remove(kb, "many")  # 65 of 150: much, but not half of it
    assert found(index, "工资") == []
    assert (folders(kb), documents_on_disk(kb)) == (before, (150, 65))
    index.compact()
    assert folders(kb) != before
    assert documents_on_disk(kb) == (85, 0)
    assert len(found(index, "合同", 99)) == len(found(FullTextIndex(kb), "合同", 99)) == 85


@pytest.mark.usefixtures("as_if_big")
def test_an_index_of_which_more_than_half_is_dead_is_written_anew_by_any_question(kb: KnowledgeBase) -> None:
    add(kb, "stays", *["合同"] * 9)
    add(kb, "goes", *["工资"] * 10)
    index = FullTextIndex(kb)
    index.save_cache()
    remove(kb, "goes")
    assert found(index, "工资") == []
    assert documents_on_disk(kb) == (9, 0)


def test_compacting_drops_the_postings_of_a_small_removal_too(
    kb: KnowledgeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fulltext, "_REWRITTEN_AT_ONCE", 0)
    add(kb, "a", "绝密")
    add(kb, "b", *["买卖合同"] * 50)
    index = FullTextIndex(kb)
    index.save_cache()
    remove(kb, "a")
    index.save_cache()
    assert documents_on_disk(kb) == (51, 1)
    index.compact()
    assert documents_on_disk(kb) == (50, 0)
    assert len(found(index, "合同", 99)) == 50
    before = folders(kb)
    index.compact()  # nothing to do
    assert folders(kb) == before


def test_it_follows_what_changed_without_looking_at_the_rest(
    kb: KnowledgeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = add(kb, "a", *["劳动合同"] * 50)
    add(kb, "b", "仲裁")
    index = FullTextIndex(kb)
    index.save_cache()

    def refuse(_: KnowledgeBase) -> None:
        raise AssertionError("all chunks were listed")

    monkeypatch.setattr(KnowledgeBase, "snapshot", refuse)
    monkeypatch.setattr(fulltext, "_REWRITTEN_AT_ONCE", 0)
    added = add(kb, "c", "买卖合同", "工资")
    remove(kb, "b")
    for each in (index, FullTextIndex(kb)):  # the one that is open, and one opened later
        assert sorted(found(each, "合同", 99)) == [*first, added[0]]
        assert found(each, "仲裁") == []
        assert each.ids().tolist() == [*first, *added]


def test_the_ids_it_tells_are_those_it_finds(kb: KnowledgeBase) -> None:
    first = add(kb, "a", "劳动合同", "工资")
    index = FullTextIndex(kb)
    assert index.ids().tolist() == first
    second = add(kb, "b", "买卖合同")
    remove(kb, "a")
    assert index.ids().tolist() == second == sorted(found(index, "合同"))


def folders(kb: KnowledgeBase) -> list[str]:
    return sorted(path.name for path in (kb.path / "fulltext").iterdir())


def test_a_saved_index_is_opened_not_rebuilt(kb: KnowledgeBase) -> None:
    ids = add(kb, "a", "合同")
    FullTextIndex(kb).save_cache()
    before = folders(kb), (kb.path / "fulltext.state").read_bytes()
    assert found(FullTextIndex(kb), "合同") == ids
    assert (folders(kb), (kb.path / "fulltext.state").read_bytes()) == before


def test_an_index_that_is_behind_is_caught_up_in_place(kb: KnowledgeBase) -> None:
    first = add(kb, "a", "合同")
    FullTextIndex(kb).save_cache()
    before = folders(kb)
    ids = add(kb, "b", "仲裁")
    index = FullTextIndex(kb)
    assert found(index, "仲裁") == ids
    assert found(index, "合同") == first
    assert folders(kb) == before


def test_an_index_that_missed_a_removal_is_caught_up(kb: KnowledgeBase) -> None:
    add(kb, "a", "合同")
    FullTextIndex(kb).save_cache()
    ids = add(kb, "b", "仲裁")
    remove(kb, "a")
    index = FullTextIndex(kb)
    assert found(index, "仲裁") == ids
    assert found(index, "合同") == []
    assert len(folders(kb)) == 1


def overwrite(path: Path, content: bytes) -> None:
    """As a new file: tantivy's threads in this process may still map the old one, and cutting that is a bus error."""
    beside = path.with_name("beside")
    beside.write_bytes(content)
    beside.replace(path)


def damage(kb: KnowledgeBase, kind: str) -> None:
    root, state = kb.path / "fulltext", kb.path / "fulltext.state"
    (folder,) = root.iterdir()
    files = sorted((path for path in folder.iterdir() if path.is_file()), key=lambda path: path.name)
    if kind == "no state":
        state.unlink()
    elif kind == "no folder":
        shutil.rmtree(root)
    elif kind == "empty folder":
        for path in files:
            path.unlink()
    elif kind == "state of zeros":
        state.write_bytes(bytes(state.stat().st_size))
    elif kind == "state cut":
        state.write_bytes(state.read_bytes()[:-9])
    elif kind == "one file gone":
        next(path for path in files if path.suffix == ".term").unlink()
    elif kind == "one file cut":
        path = next(path for path in files if path.suffix == ".idx")
        overwrite(path, path.read_bytes()[:-5])
    elif kind == "noise":
        for path in files:
            overwrite(path, bytes(byte ^ 0x5A for byte in path.read_bytes()))
    elif kind == "zeros":
        for path in files:
            overwrite(path, bytes(path.stat().st_size))
    elif kind == "no meta":
        (folder / "meta.json").unlink()


@pytest.mark.parametrize("behind", [False, True], ids=["current", "behind"])
@pytest.mark.parametrize(
    "kind",
    [
        "no state", "no folder", "empty folder", "state of zeros", "state cut", "one file gone", "one file cut",
        "noise", "zeros", "no meta",
    ],
)  # fmt: skip
def test_a_damaged_index_is_rebuilt(kb: KnowledgeBase, kind: str, behind: bool) -> None:
    ids = add(kb, "a", "劳动合同", "工资")
    FullTextIndex(kb).save_cache()
    damage(kb, kind)
    if behind:
        ids += add(kb, "b", "买卖合同")
    index = FullTextIndex(kb)
    assert sorted(found(index, "合同")) == [ids[0], *ids[2:]]
    index.save_cache()
    assert len(folders(kb)) == 1
    assert sorted(found(FullTextIndex(kb), "合同")) == [ids[0], *ids[2:]]


def test_no_flipped_bit_of_the_state_stops_a_question(kb: KnowledgeBase) -> None:
    ids = add(kb, "a", "合同")
    FullTextIndex(kb).save_cache()
    state = kb.path / "fulltext.state"
    size = state.stat().st_size
    logging.disable(logging.WARNING)
    try:
        for place in random.Random(5).sample(range(size), 60):
            content = bytearray(state.read_bytes())
            content[place % len(content)] ^= 1
            state.write_bytes(content)
            assert found(FullTextIndex(kb), "合同") == ids
    finally:
        logging.disable(logging.NOTSET)


CHILD = """
import os, signal, sys, time
from pathlib import Path
import chains.fulltext as module
from chains import fulltext
from chains.fulltext import FullTextIndex, query_terms
from chains.knowledge_base import KnowledgeBase
kb = KnowledgeBase(sys.argv[1])
"""


def child(code: str, kb: KnowledgeBase) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", CHILD + textwrap.dedent(code), str(kb.path)],
        cwd=ROOT, text=True, capture_output=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("moment", ["documents are added", "committed", "the folder is made"])
def test_an_index_whose_writer_was_killed_is_rebuilt(kb: KnowledgeBase, moment: str) -> None:
    add(kb, "a", "合同")
    FullTextIndex(kb).save_cache()
    ids = add(kb, "b", "仲裁", "仲裁法")
    result = child(
        f"""
        def killed(*_):
            os.kill(os.getpid(), signal.SIGKILL)
        if {moment!r} == "documents are added":
            module.index_terms = killed
        elif {moment!r} == "committed":
            known = FullTextIndex._checksums
            FullTextIndex._checksums = lambda self, folder: known(self, folder) if not kb.done else killed()
            kb.done = False
            texts = kb.index_texts
            def index_texts(ids):
                yield from texts(ids)
                kb.done = True
            kb.index_texts = index_texts
        else:
            (kb.path / "fulltext.state").unlink()
            module.write_cache = killed
        FullTextIndex(kb).save_cache()
        """,
        kb,
    )
    assert result.returncode == -9, result.stderr
    index = FullTextIndex(kb)
    assert sorted(found(index, "仲裁")) == ids
    assert len(folders(kb)) == 1


def test_while_another_process_writes_the_older_state_answers(kb: KnowledgeBase) -> None:
    ids = add(kb, "a", "合同")
    index = FullTextIndex(kb)
    assert found(index, "合同") == ids
    add(kb, "b", "买卖合同")
    with FileLock(kb.path / "fulltext.lock"):
        result: list[list[int]] = []
        thread = threading.Thread(target=lambda: result.append(found(index, "合同")))
        thread.start()
        thread.join(20)
        assert result == [ids]
    assert len(found(index, "合同")) == 2


def test_an_index_that_cannot_be_written_answers_from_the_older_state(kb: KnowledgeBase) -> None:
    """A full disk, as a limit on the size of files: the question still gets its answer."""
    ids = add(kb, "a", "合同")
    FullTextIndex(kb).save_cache()
    add(kb, "b", *["买卖合同"] * 2000)
    result = child(
        """
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
        index = FullTextIndex(kb)
        index.save_cache()
        print(index.search("合同", 3))
        """,
        kb,
    )
    assert result.returncode == 0, result.stderr
    assert len(FullTextIndex(kb).search("合同", 3000)) == 2001
    assert ids[0] in found(FullTextIndex(kb), "合同", 3000)


def test_two_objects_and_threads_share_one_folder(kb: KnowledgeBase) -> None:
    one, other = FullTextIndex(kb), FullTextIndex(kb)
    errors: list[BaseException] = []

    def ask(index: FullTextIndex) -> None:
        try:
            for _ in range(30):
                assert len(index.search("合同", 100)) >= 1
        except BaseException as error:  # noqa: BLE001 shown below
            errors.append(error)

    add(kb, "s", "合同")
    threads = [threading.Thread(target=ask, args=(index,)) for index in (one, one, other)]
    for thread in threads:
        thread.start()
    for number in range(6):
        add(kb, f"n{number}", "合同")
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert found(one, "合同", 100) == found(other, "合同", 100) == kb.chunk_ids().tolist()


def test_an_index_of_another_history_is_not_trusted(tmp_path: Path) -> None:
    """A restored backup counts the same chunk ids again for other texts."""
    with KnowledgeBase(tmp_path / "kb", create=True) as kb:
        add(kb, "a", "合同")
        FullTextIndex(kb).save_cache()
    for file in (tmp_path / "kb").glob("kb.sqlite*"):
        file.unlink()
    with KnowledgeBase(tmp_path / "kb", create=True) as kb:
        ids = add(kb, "a", "仲裁")
        index = FullTextIndex(kb)
        assert found(index, "合同") == []
        assert found(index, "仲裁") == ids


def test_without_an_older_state_a_question_waits_for_the_process_that_builds_the_index(
    kb: KnowledgeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    (chunk,) = add(kb, "a", "劳动合同")
    monkeypatch.setattr(fulltext, "_WAIT_S", 0.0)
    building = FileLock(kb.path / "fulltext.lock", thread_local=False)
    building.acquire()
    threading.Timer(0.3, building.release).start()
    assert found(FullTextIndex(kb), "劳动合同") == [chunk]


def test_an_index_that_is_not_there_yet_is_named_and_never_an_empty_answer(
    kb: KnowledgeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(kb, "a", "劳动合同")
    monkeypatch.setattr(fulltext, "_WAIT_FIRST_S", 0.1)
    index = FullTextIndex(kb)
    with FileLock(kb.path / "fulltext.lock"):
        with pytest.raises(IndexBusyError, match=str(kb.path)):
            index.search("劳动合同", 5)
        with pytest.raises(IndexBusyError):
            index.ids()
        index.save_cache()  # somebody is at it
        index.compact()
    assert len(found(index, "劳动合同")) == 1
