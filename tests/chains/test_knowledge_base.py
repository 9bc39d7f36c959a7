"""Reading a knowledge base: what is there is read back, what is damaged is named, many may read at once."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chains.embeddings import Vectors
from chains.knowledge_base import KnowledgeBase, KnowledgeBaseError, SourceState
from chains.knowledge_base_filters import matches
from chains.knowledge_base_integrity import integrity_problems, wrong_offsets
from chains.knowledge_base_writer import NewChunk, NewDocument, content_hash

ROOT = Path(__file__).resolve().parents[2]
STATE = SourceState(0, 10, 20, "hash", "settings")

# The same helpers for child processes, which import nothing of this file.
CHILD = """
import os, signal, sys, time
import numpy as np
from chains.knowledge_base import *
from chains.knowledge_base_writer import *
def entry(name, text):
    return NewDocument(name, name, text, {"source": name}, [NewChunk(f"{name}-0", 0, len(text), text, {})])
def vectors(n):
    return np.tile(np.array([[1, 0, 0, 0]], np.float32), (n, 1))
kb = KnowledgeBase(sys.argv[1], create=True)
def fill(generation=1):
    missing = kb.without_vector(generation)
    kb.writer().add_vectors(generation, missing, vectors(len(missing)))
"""


def child(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD + textwrap.dedent(code), *map(str, arguments)],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out


@pytest.fixture
def kb(tmp_path: Path) -> Iterator[KnowledgeBase]:
    with KnowledgeBase(tmp_path / "kb", create=True) as knowledge_base:
        yield knowledge_base


def entry(name: str, *texts: str, **metadata: Any) -> NewDocument:
    """A document of the texts, one chunk each; `metadata` is the chunks'."""
    whole, chunks = "", []
    for number, text in enumerate(texts):
        chunks.append(NewChunk(f"{name}-{number}", len(whole), len(whole) + len(text), text, metadata))
        whole += text
    title = name.upper()
    return NewDocument(content_hash(name, *texts), title, whole, {"source": name, "title": title}, chunks)


def vectors(count: int, axis: int = 0) -> Vectors:
    made = np.zeros((count, 4), np.float32)
    made[:, axis] = 1
    return made


def fill(kb: KnowledgeBase, generation: int) -> int:
    """Give every chunk without a vector one; how many they were."""
    missing = kb.without_vector(generation)
    kb.writer().add_vectors(generation, missing, vectors(len(missing), generation % 4))
    return len(missing)


def stage(kb: KnowledgeBase, name: str, *entries: NewDocument, state: SourceState = STATE) -> int:
    """A source that is written and not yet visible."""
    writer = kb.writer()
    generation = writer.first_generation("fake", vectors(1)[0], None)
    source_id, _ = writer.begin_source(name, state)
    writer.add_documents(source_id, entries)
    fill(kb, generation.id)
    return source_id


def store(kb: KnowledgeBase, name: str, *entries: NewDocument, state: SourceState = STATE) -> None:
    source_id = stage(kb, name, *entries, state=state)
    answering = kb.generation()
    assert answering is not None
    kb.writer().activate(source_id, answering.id)


# -- opening -----------------------------------------------------------------------------------------------------


def test_a_missing_knowledge_base_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(KnowledgeBaseError, match=r"ragproj ingest FOLDER --kb .*none"):
        KnowledgeBase(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_new_one_is_empty_and_can_be_opened_again(tmp_path: Path) -> None:
    for create in (True, False, True):
        with KnowledgeBase(tmp_path / "a" / "b", create=create) as kb:
            assert (kb.sources(), kb.source_names(), kb.chunk_count(), kb.revision()) == ([], [], 0, "")
            assert len(kb.chunk_ids()) == len(kb.chunk_ids_of("x")) == len(kb.matching_ids({})) == 0
            assert (kb.generation(), kb.source_state("x"), kb.previous_generation(), kb.document_text(1)) == (None,) * 4
            assert kb.chunks([]) == kb.chunks([1]) == {}
            assert kb.chunks_by_key([]) == kb.chunks_by_key(["x"]) == {}
            assert kb.neighbours(1) == []
            assert list(kb.vectors(1, np.zeros(0, np.int64))) == []


def test_a_file_where_the_folder_should_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "kb").write_text("x", encoding="utf-8")
    with pytest.raises(KnowledgeBaseError, match="kb"):
        KnowledgeBase(tmp_path / "kb", create=True)


@pytest.mark.parametrize("create", [True, False])
def test_another_programs_database_is_refused_and_left_alone(tmp_path: Path, create: bool) -> None:
    with sqlite3.connect(tmp_path / "kb.sqlite") as connection:
        connection.execute("CREATE TABLE theirs (x)")
    connection.close()
    before = (tmp_path / "kb.sqlite").read_bytes()
    with pytest.raises(KnowledgeBaseError, match="is not a knowledge base"):
        KnowledgeBase(tmp_path, create=create)
    assert (tmp_path / "kb.sqlite").read_bytes() == before


@pytest.mark.parametrize("create", [True, False])
@pytest.mark.parametrize("damage", ["noise", "text", "header"])
def test_a_damaged_file_is_named_and_left_as_it_is(kb: KnowledgeBase, damage: str, create: bool) -> None:
    store(kb, "a", entry("a", "甲"))
    kb.close()
    file = kb.path / "kb.sqlite"
    content = bytearray(file.read_bytes())
    if damage == "noise":
        content = bytearray(byte ^ 0x5A for byte in content)
    elif damage == "text":
        content = bytearray("这不是数据库".encode() * 200)
    else:
        content[:16] = b"\0" * 16
    file.write_bytes(content)
    with pytest.raises(KnowledgeBaseError, match="damaged"):
        KnowledgeBase(kb.path, create=create)
    assert file.read_bytes() == content


@pytest.mark.parametrize(
    "read",
    [
        pytest.param(lambda kb: kb.chunks(range(1, 2000)), id="chunks"),
        pytest.param(lambda kb: kb.matching_ids({"number": 3}), id="matching_ids"),
        pytest.param(lambda kb: kb.matching_ids(lambda metadata: True), id="function"),
        pytest.param(lambda kb: list(kb.index_texts(np.arange(1, 2000))), id="index_texts"),
        pytest.param(lambda kb: kb.neighbours(2), id="neighbours"),
    ],
)
def test_damage_found_while_reading_is_named(kb: KnowledgeBase, read: Callable[[KnowledgeBase], object]) -> None:
    """Pages lost at the end of the file show only when a query gets there, after its first rows."""
    for source in ("a", "b"):
        store(kb, source, entry(source, *["文" * 400] * 600, number=3))
    kb.close()
    file = kb.path / "kb.sqlite"
    content = file.read_bytes()
    keep = int(len(content) * 0.95) // 16384 * 16384
    file.write_bytes(content[:keep] + b"\x5a" * (len(content) - keep))
    with KnowledgeBase(kb.path) as damaged, pytest.raises(KnowledgeBaseError, match="damaged"):
        read(damaged)


def test_ids_are_read_whole_from_a_damaged_file_or_the_damage_is_named(kb: KnowledgeBase) -> None:
    """They stand in an index of their own, a few pages far from the text; never is a part of them taken for all."""
    for source in ("a", "b"):
        store(kb, source, entry(source, *["文" * 400] * 600))
    ids = kb.chunk_ids().tolist()
    kb.close()
    file = kb.path / "kb.sqlite"
    content = file.read_bytes()
    pages = len(content) // 16384
    named = 0
    for page in range(1, pages):
        file.write_bytes(content[: page * 16384] + b"\x5a" * 16384 + content[(page + 1) * 16384 :])
        try:
            with KnowledgeBase(kb.path) as damaged:
                assert damaged.chunk_ids().tolist() == ids
        except KnowledgeBaseError as error:
            assert "damaged" in error.en
            named += 1
    assert 0 < named < pages - 1


def test_damage_of_most_of_the_file_is_named(kb: KnowledgeBase) -> None:
    store(kb, "a", entry("a", *["文" * 400] * 600))
    kb.close()
    file = kb.path / "kb.sqlite"
    content = file.read_bytes()
    file.write_bytes(content[:16384] + b"\x5a" * (len(content) - 16384))
    damaged_bytes = file.read_bytes()
    for read in (KnowledgeBase.sources, KnowledgeBase.generation, KnowledgeBase.revision, KnowledgeBase.source_names):
        with pytest.raises(KnowledgeBaseError, match="damaged"), KnowledgeBase(kb.path) as damaged:
            read(damaged)
    assert file.read_bytes() == damaged_bytes


def test_a_file_left_empty_by_a_crash_at_the_first_start_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "kb.sqlite").touch()
    with KnowledgeBase(tmp_path, create=True) as kb:
        assert kb.sources() == []


@pytest.mark.parametrize("trace", ["faiss-1.index", "fulltext.state", "files/upload.txt"])
def test_a_file_emptied_beside_what_was_made_of_it_is_refused_and_left_alone(tmp_path: Path, trace: str) -> None:
    """A copy that failed, or a full disk: beginning anew would hide that everything is lost."""
    (tmp_path / "kb.sqlite").touch()
    (tmp_path / trace).parent.mkdir(exist_ok=True)
    (tmp_path / trace).write_text("x", encoding="utf-8")
    for create in (True, False):
        with pytest.raises(KnowledgeBaseError, match=r"kb\.sqlite is damaged \(0 bytes\)"):
            KnowledgeBase(tmp_path, create=create)
    assert (tmp_path / "kb.sqlite").stat().st_size == 0


def test_many_processes_may_create_it_at_once(tmp_path: Path) -> None:
    code = """
        time.sleep(max(0, float(sys.argv[2]) - time.time()))
        for number in range(12):
            KnowledgeBase(f"{sys.argv[1]}-{number}", create=True).sources()
            time.sleep(0.01)
    """
    start = time.time() + 1.5
    for process in [child(code, tmp_path / "kb", start) for _ in range(3)]:
        finish(process)


# -- reading back ------------------------------------------------------------------------------------------------


def test_everything_about_a_chunk_is_read_back(kb: KnowledgeBase) -> None:
    metadata = {"page": 3, "headings": ["章", "节"], "x": None, "f": 0.5, "t": True, "引号": "'\"\\😀"}
    store(kb, "一.md", NewDocument("h", "标题", "甲乙丙", {"id": 7}, [NewChunk("key", 1, 3, "乙丙", metadata)]))
    (chunk,) = kb.chunks(kb.chunk_ids().tolist()).values()
    assert (chunk.key, chunk.source, chunk.start, chunk.end, chunk.text) == ("key", "一.md", 1, 3, "乙丙")
    assert chunk.metadata == {"id": 7, **metadata}
    assert (chunk.title, chunk.duplicates) == ("标题", ())
    text = kb.document_text(chunk.document_id)
    assert text is not None
    assert text[chunk.start : chunk.end] == chunk.text
    document = chunk.document()
    assert (document.id, document.page_content, document.metadata) == ("key", "乙丙", chunk.metadata)


def test_sources_are_listed_by_name_with_their_sizes(kb: KnowledgeBase) -> None:
    store(kb, "b/二.txt", NewDocument("h", "", "甲乙", {}, []))
    store(kb, "a", entry("x", "甲", "乙丙"), entry("y", "丁"))
    first, second = kb.sources()
    assert (first.source, first.title, first.documents, first.chunks, first.characters) == ("a", "X", 2, 3, 4)
    assert (second.source, second.title, second.documents, second.chunks, second.characters) == (
        "b/二.txt", "二", 1, 0, 2,
    )  # fmt: skip
    assert first.added.endswith("+00:00")


def test_vectors_come_by_ascending_id_in_half_precision(kb: KnowledgeBase) -> None:
    wanted = np.random.default_rng(0).normal(size=(5000, 4)).astype(np.float32)
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    writer = kb.writer()
    made = writer.first_generation("fake", wanted[0], None).id
    source_id, _ = writer.begin_source("a", STATE)
    writer.add_documents(source_id, [entry("a", *["字"] * 5000)])
    writer.add_vectors(made, kb.without_vector(made), wanted)
    writer.activate(source_id, 1)
    ids = kb.chunk_ids()
    batches = list(kb.vectors(made, ids[::-1]))
    assert len(batches) > 1  # read in parts
    assert np.concatenate([batch for batch, _ in batches]).tolist() == ids.tolist()
    found = np.concatenate([rows for _, rows in batches])
    assert found.dtype == np.float32
    assert np.abs((found * wanted).sum(axis=1) - 1).max() < 1e-3
    some = ids[[4999, 7, 0]]
    assert [int(i) for batch, _ in kb.vectors(made, some) for i in batch] == sorted(some.tolist())
    assert list(kb.vectors(made + 1, ids)) == []


def test_neighbours_are_the_documents_chunks_in_text_order(kb: KnowledgeBase) -> None:
    made = entry("a", "一", "二", "三")
    store(kb, "a", NewDocument("h", "", made.text, {}, made.chunks[::-1]), entry("b", "别"))
    document = kb.chunks_by_key(["a-1"])["a-1"].document_id
    assert [chunk.text for chunk in kb.neighbours(document)] == ["一", "二", "三"]


def test_index_texts_hold_context_and_text(kb: KnowledgeBase) -> None:
    store(kb, "a", entry("a", "正文", headings=["第一章"]))
    ((number, text),) = kb.index_texts(kb.chunk_ids())
    assert number == kb.chunk_ids()[0]
    assert text.split("\n") == ["A", "第一章", "正文"]


def test_more_ids_than_sqlite_takes_in_one_list_are_read(kb: KnowledgeBase) -> None:
    store(kb, "a", entry("a", *["字"] * 1300))
    assert len(kb.chunks(range(50_000))) == 1300
    assert len(kb.chunks_by_key([f"a-{n}" for n in range(40_000)])) == 1300


# -- filters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ({}, "012"),
        ({"n": 0}, "0"),
        ({"n": 0.0}, "0"),
        ({"n": [0, 2]}, "02"),
        ({"n": (0, 2)}, "02"),
        ({"n": {0, 2}}, "02"),
        ({"n": frozenset()}, ""),
        ({"n": "0"}, ""),
        ({"tags": "法"}, "02"),
        ({"tags": ["旧", "新"]}, "12"),
        ({"tags": "法", "n": 2}, "2"),
        ({"flag": True}, "1"),
        ({"source": "s"}, "012"),
        ({"$.n": 0}, ""),
        ({"点.键": 1}, "1"),
        ({"n": "'; DROP TABLE chunks; --"}, ""),
        (lambda metadata: metadata["n"] % 2 == 0, "02"),
        (lambda metadata: False, ""),
    ],
)
def test_a_filter_matches_metadata(kb: KnowledgeBase, condition: Any, expected: str) -> None:
    rows: list[dict[str, Any]] = [
        {"n": 0, "tags": ["法", "短"]},
        {"n": 1, "flag": True, "点.键": 1, "tags": "旧"},
        {"n": 2, "tags": ["法", "新"], "flag": False},
    ]
    chunks = [NewChunk(f"{row['n']}", 0, 1, "字", {"source": "s", **row}) for row in rows]
    store(kb, "s", NewDocument("h", "", "字", {}, chunks))
    found = kb.matching_ids(condition)
    assert found.dtype == np.int64
    assert found.tolist() == sorted(found.tolist())
    assert "".join(chunk.key for chunk in kb.chunks(found.tolist()).values()) == expected


def test_a_filter_key_may_hold_a_quotation_mark(kb: KnowledgeBase) -> None:
    store(kb, "a", entry("a", "甲", **{'键"': 1}))
    assert len(kb.matching_ids({'键"': 1})) == 1


@pytest.mark.parametrize("value", [object(), {"a": 1}, [["x"]]])
def test_a_filter_value_that_cannot_match_is_no_damage(kb: KnowledgeBase, value: object) -> None:
    store(kb, "a", entry("a", "甲"))
    with pytest.raises(Exception) as caught:
        kb.matching_ids({"n": value})
    assert "damaged" not in str(caught.value)


# -- threads and processes -------------------------------------------------------------------------------------------


def test_threads_share_one_object(kb: KnowledgeBase) -> None:
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(5):
                store(kb, f"{number}-{turn}", entry(f"{number}-{turn}", "甲"))
                assert f"{number}-{turn}" in kb.source_names()
        except BaseException as error:  # noqa: BLE001 shown below
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert kb.chunk_count() == 20


def test_threads_that_are_gone_keep_no_file_open(kb: KnowledgeBase) -> None:
    kb.revision()
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(40):
        thread = threading.Thread(target=kb.revision)
        thread.start()
        thread.join()
    assert len(os.listdir("/proc/self/fd")) <= before + 6  # noqa: PTH208


def test_a_closed_knowledge_base_opens_again_on_use(kb: KnowledgeBase) -> None:
    store(kb, "a", entry("a", "甲"))
    kb.close()
    kb.close()
    assert kb.source_names() == ["a"]


# -- the right to write a source -----------------------------------------------------------------------------------


def test_a_claim_on_a_source_keeps_another_process_waiting_until_it_is_given_up(kb: KnowledgeBase) -> None:
    code = """
        with kb.claimed(sys.argv[2]):
            print("claimed", flush=True)
            sys.stdin.readline()
    """
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD + textwrap.dedent(code), str(kb.path), "一.txt"],
        cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "claimed\n"
    claimed = threading.Event()

    def claim() -> None:
        with kb.claimed("一.txt"):
            claimed.set()

    thread = threading.Thread(target=claim)
    thread.start()
    with kb.claimed("二.txt"):  # another source (of another stripe) is free
        assert not claimed.wait(0.3)
    process.kill()  # a dead owner gives it up, too
    process.communicate()
    assert claimed.wait(20)
    thread.join(20)


def test_claims_leave_no_more_files_than_there_are_locks(kb: KnowledgeBase) -> None:
    for number in range(300):
        with kb.claimed(f"{number}.txt"):
            pass
    assert len(list((kb.path / "locks").iterdir())) <= 64


# -- equal documents -----------------------------------------------------------------------------------------------


def shared(name: str, **metadata: Any) -> NewDocument:
    """A document whose text others have, too."""
    data = {"source": name, "title": name.upper(), **metadata}
    return NewDocument("same", name.upper(), "同样的文本", data, [NewChunk("same-0", 0, 5, "同样的文本", {"page": 1})])


def test_a_shared_chunk_stands_under_its_first_document_with_the_others_beside(kb: KnowledgeBase) -> None:
    for name in ("b", "a"):
        store(kb, name, shared(name))
    (chunk,) = kb.chunks(kb.chunk_ids().tolist()).values()
    assert (chunk.source, chunk.metadata) == ("b", {"source": "b", "title": "B", "page": 1})
    assert chunk.duplicates == ({"source": "a", "title": "A", "page": 1},)
    assert kb.chunks_by_key(["same-0"])["same-0"] == chunk
    assert kb.neighbours(chunk.document_id) == [chunk]


def test_of_several_holders_the_one_a_filter_asks_for_is_taken(kb: KnowledgeBase) -> None:
    for name in ("a", "b", "c"):
        store(kb, name, shared(name, lang="zh" if name == "c" else "en"))
    (number,) = kb.chunk_ids().tolist()
    for condition, source, others in (
        ({"source": "b"}, "b", []),
        ({"source": ["c", "b"]}, "b", ["c"]),
        ({"lang": "zh"}, "c", []),
        ({"page": 1}, "a", ["b", "c"]),
        (lambda metadata: metadata["title"] == "C", "c", []),
    ):
        assert kb.matching_ids(condition).tolist() == [number]
        chunk = kb.chunks([number], condition)[number]
        assert chunk.source == chunk.metadata["source"] == source
        assert sorted(other["source"] for other in chunk.duplicates) == others  # none that the filter leaves out
    assert kb.matching_ids({"source": "d"}).tolist() == []
    assert kb.matching_ids({"source": "a", "lang": "zh"}).tolist() == []  # no one document is both


def test_each_source_counts_and_names_what_it_shares(kb: KnowledgeBase) -> None:
    store(kb, "a", shared("a"), entry("own", "甲"))
    store(kb, "b", shared("b"))
    assert [(info.source, info.title, info.documents, info.chunks, info.characters) for info in kb.sources()] == [
        ("a", "A", 2, 2, 6), ("b", "B", 1, 1, 5),
    ]  # fmt: skip
    assert kb.chunk_count() == 2
    assert set(kb.chunk_ids_of("b").tolist()) < set(kb.chunk_ids_of("a").tolist())
    assert len(set(kb.document_ids(kb.chunk_ids()).values())) == 2


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ({}, True), ({"n": 1}, True), ({"n": [2, 1]}, True), ({"n": 2}, False), ({"n": "1"}, False),
        ({"tags": "新"}, True), ({"tags": ["x", "法"]}, True), ({"missing": 1}, False), ({"none": 0}, False),
        (lambda metadata: metadata["n"] == 1, True), ({"n": 1, "tags": "旧"}, False),
    ],
)  # fmt: skip
def test_one_documents_metadata_is_matched_as_the_database_does_it(
    kb: KnowledgeBase, condition: Any, expected: bool
) -> None:
    metadata = {"n": 1, "tags": ["法", "新"], "none": None}
    assert matches(metadata, condition) is expected
    store(kb, "s", NewDocument("h", "", "字", metadata, [NewChunk("k", 0, 1, "字", {})]))
    assert bool(len(kb.matching_ids(condition))) is expected


@pytest.mark.parametrize("read", [KnowledgeBase.chunk_ids, lambda kb: range(kb.chunk_count())], ids=["ids", "count"])
def test_a_source_begun_while_a_reader_reads_is_not_seen(
    kb: KnowledgeBase, read: Callable[[KnowledgeBase], Any]
) -> None:
    store(kb, "a", entry("a", "甲"))

    def begin(statement: str) -> None:
        if "FROM chunks" in statement:  # just before SQLite runs it
            kb._connection().set_trace_callback(None)
            with KnowledgeBase(kb.path) as other:
                stage(other, "b", entry("b", "乙"))

    kb._connection().set_trace_callback(begin)
    assert len(read(kb)) == 1
    assert len(read(kb)) == 1


# -- what `check` asks ---------------------------------------------------------------------------------------------


def test_an_intact_knowledge_base_has_no_problems(kb: KnowledgeBase) -> None:
    store(kb, "a", entry("a", "甲", "乙"), shared("a"))
    stage(kb, "b", shared("b"))
    assert (integrity_problems(kb), wrong_offsets(kb)) == ([], [])


@pytest.mark.parametrize(
    "harm",
    [
        "DELETE FROM contents",
        "DELETE FROM documents",
        "DELETE FROM sources",
        "INSERT INTO chunks (key, content_id, start, end, text, metadata) VALUES ('k', 99, 0, 1, 'x', '{}')",
    ],
)
def test_rows_that_hang_in_the_air_are_problems(kb: KnowledgeBase, harm: str) -> None:
    store(kb, "a", entry("a", "甲", "乙"))
    with sqlite3.connect(kb.path / "kb.sqlite") as connection:
        connection.execute(harm)
    connection.close()
    assert integrity_problems(kb) != []


def test_a_chunk_that_is_not_at_its_offsets_is_found(kb: KnowledgeBase) -> None:
    store(kb, "a", entry("a", "😀甲", "乙丙"))  # offsets are in characters, not in bytes or UTF-16
    assert wrong_offsets(kb) == []
    with sqlite3.connect(kb.path / "kb.sqlite") as connection:
        connection.execute("UPDATE chunks SET start = start + 1 WHERE key = 'a-1'")
    connection.close()
    assert wrong_offsets(kb) == [kb.chunks_by_key(["a-1"])["a-1"].id]
