"""Writing a knowledge base: what is committed stays, what is removed is gone, and nothing half-made is ever seen."""

from __future__ import annotations

import signal
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
from langchain_core.embeddings import DeterministicFakeEmbedding

from chains import knowledge_base_writer
from chains.embeddings import Vectors
from chains.knowledge_base import KnowledgeBase, KnowledgeBaseError, SourceState
from chains.knowledge_base_integrity import integrity_problems
from chains.knowledge_base_writer import GenerationChangedError, NewChunk, NewDocument, content_hash
from chains.vectorstores import UNNAMED_SOURCE, FaissVectorStore

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


def counts(kb: KnowledgeBase) -> dict[str, int]:
    """Rows of every table, read behind the knowledge base's back."""
    connection = sqlite3.connect(kb.path / "kb.sqlite")
    try:
        return {
            table: connection.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0]
            for table in ("sources", "contents", "documents", "chunks", "vectors")
        }
    finally:
        connection.close()


def rows(sources: int, documents: int, chunks: int, *, contents: int | None = None) -> dict[str, int]:
    """What `counts` says of so many sources and documents, each chunk with one vector."""
    contents = documents if contents is None else contents
    return {"sources": sources, "contents": contents, "documents": documents, "chunks": chunks, "vectors": chunks}


# -- staged and active -------------------------------------------------------------------------------------------


def test_a_staged_source_is_seen_by_no_reader(kb: KnowledgeBase) -> None:
    store(kb, "a", entry("a", "甲", "乙"))
    revision = kb.revision()
    source_id = stage(kb, "b", entry("b", "丙"))
    assert kb.source_names() == ["a"]
    assert [info.source for info in kb.sources()] == ["a"]
    assert kb.chunk_count() == len(kb.chunk_ids()) == len(kb.matching_ids({})) == 2
    assert len(kb.matching_ids(lambda metadata: True)) == 2
    assert kb.chunks(range(10)).keys() == set(kb.chunk_ids().tolist())
    assert kb.chunks_by_key(["b-0"]) == {}
    assert len(kb.chunk_ids_of("b")) == 0
    assert kb.source_state("b") is None
    assert [chunk.key for n in range(9) for chunk in kb.neighbours(n)] == ["a-0", "a-1"]
    assert kb.revision() == revision
    writer = kb.writer()
    writer.activate(source_id, 1)
    assert kb.source_names() == ["a", "b"]
    assert kb.chunks_by_key(["b-0"])["b-0"].text == "丙"
    assert kb.revision() != revision


def test_the_old_version_answers_until_the_new_one_is_switched_on(kb: KnowledgeBase) -> None:
    store(kb, "a", entry("a", "旧"))
    old = kb.chunk_ids().tolist()
    source_id = stage(kb, "a", entry("a", "新", "新二"), state=SourceState(0, 1, 2, "other", "settings"))
    assert kb.chunks_by_key(["a-0"])["a-0"].text == "旧"
    writer = kb.writer()
    writer.activate(source_id, 1)
    assert [chunk.text for chunk in kb.chunks(range(10)).values()] == ["新", "新二"]
    assert not set(old) & set(kb.chunk_ids().tolist())
    assert counts(kb) == rows(1, 1, 2)
    state = kb.source_state("a")
    assert state is not None
    assert (state.size, state.mtime_ns, state.sha256) == (1, 2, "other")


def test_a_chunk_id_is_never_used_again(kb: KnowledgeBase) -> None:
    seen: set[int] = set()
    for _ in range(4):
        store(kb, "a", entry("a", "甲", "乙"))
        ids = set(kb.chunk_ids().tolist())
        assert not ids & seen
        seen |= ids
        writer = kb.writer()
        assert writer.remove_sources(["a"]) == 1


def test_a_staged_source_is_resumed_when_file_and_settings_are_the_same(kb: KnowledgeBase) -> None:
    source_id = stage(kb, "a", entry("a1", "甲"), entry("a2", "乙"))
    writer = kb.writer()
    assert writer.begin_source("a", STATE) == (source_id, 2)


@pytest.mark.parametrize(
    "state",
    [
        SourceState(0, 10, 20, "another hash", "settings"),
        SourceState(0, 10, 20, "hash", "other settings"),
        SourceState(0, 10, 20, None, "settings"),
    ],
)
def test_a_staged_source_of_another_version_is_dropped(kb: KnowledgeBase, state: SourceState) -> None:
    first = stage(kb, "a", entry("a", "甲"))
    writer = kb.writer()
    second, stored = writer.begin_source("a", state)
    assert (second != first, stored) == (True, 0)
    assert counts(kb) == rows(1, 0, 0)


def test_a_batch_that_fails_leaves_nothing_of_itself(kb: KnowledgeBase) -> None:
    source_id = stage(kb, "a", entry("a1", "甲"))
    writer = kb.writer()
    with pytest.raises(TypeError, match="JSON"):
        writer.add_documents(source_id, [entry("a2", "乙"), entry("a3", "丙", bad=object())])
    assert counts(kb) == rows(1, 1, 1)
    writer.add_documents(source_id, [entry("a2", "乙")])
    writer.activate(source_id, 1)
    assert kb.chunk_count() == 2


def test_touching_remembers_size_and_time_without_a_new_revision(kb: KnowledgeBase) -> None:
    store(kb, "a", entry("a", "甲"))
    revision, state = kb.revision(), kb.source_state("a")
    assert state is not None
    writer = kb.writer()
    writer.touch(state.id, SourceState(0, 11, 21, "hash", "settings"))
    after = kb.source_state("a")
    assert after == SourceState(state.id, 11, 21, "hash", "settings")
    assert kb.revision() == revision


# -- removing ----------------------------------------------------------------------------------------------------


def test_removing_a_source_leaves_no_row_of_it(kb: KnowledgeBase) -> None:
    store(kb, "a", entry("a", "甲", "乙"))
    store(kb, "b", entry("b", "丙"))
    stage(kb, "a", entry("a", "甲二"), state=SourceState(0, 1, 1, "next", "settings"))
    revision = kb.revision()
    writer = kb.writer()
    assert writer.remove_sources(["a", "unknown"]) == 1
    assert counts(kb) == rows(1, 1, 1)
    assert kb.source_names() == ["b"]
    assert kb.revision() != revision


def test_removing_nothing_changes_nothing(kb: KnowledgeBase) -> None:
    store(kb, "a", entry("a", "甲"))
    revision = kb.revision()
    writer = kb.writer()
    assert writer.remove_sources(["b"]) == writer.remove_sources([]) == writer.remove_chunks([]) == 0
    assert writer.remove_chunks(["nope"]) == 0
    assert kb.revision() == revision


def test_removing_chunks_takes_documents_and_sources_left_empty(kb: KnowledgeBase) -> None:
    store(kb, "a", entry("a", "甲", "乙"), entry("b", "丙"))
    writer = kb.writer()
    assert writer.remove_chunks(["a-0", "b-0"]) == 2
    assert counts(kb) == rows(1, 1, 1)
    assert writer.remove_chunks(["a-1"]) == 1
    assert counts(kb) == rows(0, 0, 0)


def test_removing_chunks_leaves_a_staged_version_alone(kb: KnowledgeBase) -> None:
    store(kb, "a", entry("a", "甲"))
    state = SourceState(0, 1, 1, "next", "settings")
    staged = stage(kb, "a", entry("new", "新甲"), entry("b", "乙"), state=state)
    assert kb.writer().remove_chunks(["a-0", "new-0"]) == 1  # the second one is not visible
    assert kb.writer().begin_source("a", state) == (staged, 2)
    assert counts(kb) == rows(1, 2, 2)


def test_a_staged_version_that_shares_a_removed_chunk_is_read_again_from_its_start(kb: KnowledgeBase) -> None:
    """Resuming it would skip the document whose chunk is gone."""
    store(kb, "a", entry("a", "甲"))
    state = SourceState(0, 1, 1, "next", "settings")
    stage(kb, "a", entry("a", "甲"), entry("b", "乙"), state=state)
    assert kb.writer().remove_chunks(["a-0"]) == 1
    assert kb.writer().begin_source("a", state)[1] == 0
    assert counts(kb) == rows(1, 0, 0)


SECRET = "绝密内容"


def traces(kb: KnowledgeBase) -> list[str]:
    """Files of the knowledge base that hold the secret."""
    return [path.name for path in kb.path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


def remove_source(kb: KnowledgeBase) -> None:
    kb.writer().remove_sources(["a"])


def remove_chunk(kb: KnowledgeBase) -> None:
    kb.writer().remove_chunks(["a-0"])


def replace_source(kb: KnowledgeBase) -> None:
    store(kb, "a", entry("a", "新"), state=SourceState(0, 1, 1, "next", "settings"))


@pytest.mark.parametrize("remove", [remove_source, remove_chunk, replace_source])
@pytest.mark.parametrize("closed", [True, False], ids=["closed", "open elsewhere"])
def test_removed_text_is_in_no_file(kb: KnowledgeBase, remove: Callable[[KnowledgeBase], None], closed: bool) -> None:
    store(kb, "a", entry("a", SECRET * 50))
    store(kb, "b", entry("b", "其他"))
    with KnowledgeBase(kb.path) as other:  # a server that goes on running keeps the WAL alive
        if closed:
            other.close()
        else:
            other.chunk_count()
        remove(kb)
        kb.close()
        assert traces(kb) == []


def test_the_space_of_a_removed_source_comes_back(kb: KnowledgeBase) -> None:
    store(kb, "a", entry("a", "甲"))

    def size() -> int:
        return sum(path.stat().st_size for path in kb.path.glob("kb.sqlite*"))

    kb.writer().remove_sources(["none"])  # what is in the log goes to the file
    before = size()
    store(kb, "big", entry("big", *[f"{number}" * 2000 for number in range(800)]))
    kb.writer().remove_sources(["none"])
    assert size() > before + 2_000_000
    kb.writer().remove_sources(["big"])
    assert size() <= before + 200_000
    assert kb.chunks_by_key(["a-0"])["a-0"].text == "甲"


# -- revisions ---------------------------------------------------------------------------------------------------


def test_every_visible_change_has_a_new_revision_that_is_known(kb: KnowledgeBase) -> None:
    seen = [kb.revision()]
    for change in range(5):
        store(kb, f"s{change}", entry(f"s{change}", "甲"))
        seen.append(kb.revision())
    assert len(set(seen)) == 6
    assert all(kb.knows_revision(token) for token in seen[1:])
    assert not kb.knows_revision("")
    assert not kb.knows_revision("0" * 32)


def test_old_revisions_are_forgotten(kb: KnowledgeBase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chains.knowledge_base_writer._REVISIONS_KEPT", 3)
    first = ""
    writer = kb.writer()
    for _ in range(5):
        with writer._transaction() as run:
            knowledge_base_writer._bump(run, (), ())
        first = first or kb.revision()
    assert not kb.knows_revision(first)
    assert kb.knows_revision(kb.revision())


# -- equal documents -------------------------------------------------------------------------------------------------


def same(name: str, *, key: str = "same", text: str = "同样的文本") -> NewDocument:
    """A document with a content that others have, too."""
    chunks = [NewChunk(f"{key}-{n}", 5 * n, 5 * n + 5, text, {}) for n in range(2)]
    return NewDocument(key, name.upper(), text * 2, {"source": name, "title": name.upper()}, chunks)


def test_equal_documents_are_stored_once_and_kept_while_one_source_is_left(kb: KnowledgeBase) -> None:
    for name in ("a", "b", "c"):
        store(kb, name, same(name))
    assert counts(kb) == rows(3, 3, 2, contents=1)
    ids = kb.chunk_ids().tolist()
    for removed, left in (("b", "a"), ("a", "c")):
        assert kb.writer().remove_sources([removed]) == 1
        assert kb.chunk_ids().tolist() == ids
        assert {chunk.source for chunk in kb.chunks(ids).values()} == {left}
        assert [len(batch) for batch, _ in kb.vectors(1, kb.chunk_ids())] == [2]
    assert kb.writer().remove_sources(["c"]) == 1
    assert counts(kb) == rows(0, 0, 0)


def test_equal_documents_of_one_source_count_twice_and_are_stored_once(kb: KnowledgeBase) -> None:
    store(kb, "a", same("a"), same("a"))
    assert counts(kb) == rows(1, 2, 2, contents=1)
    (info,) = kb.sources()
    assert (info.documents, info.characters) == (2, 20)
    replaced = entry("a", "另一份")
    store(kb, "a", replaced)
    assert counts(kb) == rows(1, 1, 1)


def test_staged_content_becomes_visible_only_when_activated(kb: KnowledgeBase) -> None:
    store(kb, "a", entry("a", "甲"))
    first, second = stage(kb, "b", same("b")), stage(kb, "c", same("c"))
    assert kb.chunk_count() == 1
    kb.writer().activate(second, 1)
    assert [chunk.source for chunk in kb.chunks(kb.chunk_ids_of("c").tolist()).values()] == ["c", "c"]
    assert all(chunk.duplicates == () for chunk in kb.chunks(kb.chunk_ids().tolist()).values())
    kb.writer().activate(first, 1)
    (chunk, _) = kb.chunks(kb.chunk_ids_of("b").tolist()).values()
    assert sorted([chunk.source, *(other["source"] for other in chunk.duplicates)]) == ["b", "c"]
    assert counts(kb) == rows(3, 3, 3, contents=2)


def test_content_shared_by_a_source_in_the_making_outlives_the_visible_one(kb: KnowledgeBase) -> None:
    store(kb, "a", same("a"))
    staged = stage(kb, "b", same("b"))
    kb.writer().remove_sources(["a"])
    assert (kb.chunk_count(), kb.matching_ids({}).tolist()) == (0, [])
    kb.writer().activate(staged, 1)
    assert kb.chunk_count() == 2
    assert counts(kb) == rows(1, 1, 2)


def test_chunks_removed_from_shared_content_come_back_with_a_source_that_is_added_later(kb: KnowledgeBase) -> None:
    store(kb, "a", same("a"))
    assert kb.writer().remove_chunks(["same-0"]) == 1
    store(kb, "b", same("b"))
    assert [chunk.key for chunk in kb.chunks(kb.chunk_ids_of("b").tolist()).values()] == ["same-0", "same-1"]


def test_removing_all_chunks_of_shared_content_does_not_empty_a_source_in_the_making(kb: KnowledgeBase) -> None:
    store(kb, "a", same("a"))
    staged = stage(kb, "b", same("b"))
    assert kb.writer().remove_chunks(["same-0", "same-1"]) == 2
    assert kb.source_names() == []
    with pytest.raises(KnowledgeBaseError, match="ingest it again"):  # not: activated without a chunk
        kb.writer().activate(staged, 1)
    assert counts(kb) == rows(0, 0, 0)
    store(kb, "b", same("b"))
    assert len(kb.chunk_ids_of("b")) == 2


# -- removed while it is being written -------------------------------------------------------------------------------


def test_a_source_removed_meanwhile_can_neither_be_filled_nor_activated(kb: KnowledgeBase) -> None:
    writer = kb.writer()
    source_id = stage(kb, "a", entry("a", "甲"))
    assert writer.remove_sources(["a"]) == 0  # it was not visible yet
    for act in (
        lambda: writer.add_documents(source_id, [entry("b", "乙")]),
        lambda: writer.activate(source_id, 1),
    ):
        with pytest.raises(KnowledgeBaseError, match="removed while it was being ingested"):
            act()
    assert counts(kb) == rows(0, 0, 0)


def test_vectors_of_chunks_removed_meanwhile_are_not_stored(kb: KnowledgeBase) -> None:
    stage(kb, "a", entry("a", "甲", "乙"))
    store(kb, "b", entry("b", "丙"))
    kb.writer().remove_sources(["a"])
    kb.writer().add_vectors(1, np.array([1, 2, 3]), vectors(3))
    assert counts(kb) == rows(1, 1, 1)


# -- generations -----------------------------------------------------------------------------------------------------


def second_generation(kb: KnowledgeBase) -> int:
    return kb.writer().add_generation("other", np.array([0, 0, 1, 0], np.float32), {"_type": "x"}).id


def stored(kb: KnowledgeBase, generation: int) -> list[list[float]]:
    return [row for _, batch in kb.vectors(generation, kb.chunk_ids()) for row in batch.tolist()]


def test_the_first_generation_is_made_once_and_answers(kb: KnowledgeBase) -> None:
    first = kb.writer().first_generation("fake", vectors(1)[0], {"_type": "x", "n": 1})
    again = kb.writer().first_generation("another", vectors(1, 2)[0], None)
    assert first.id == again.id
    assert (again.fingerprint, again.dimensions, again.embedder) == ("fake", 4, {"_type": "x", "n": 1})
    assert again.probe.tolist() == [1, 0, 0, 0]
    assert [made.id for made in kb.generations()] == [first.id]


def test_a_generation_answers_only_when_it_is_complete_and_switched_to(kb: KnowledgeBase) -> None:
    store(kb, "a", entry("a", "甲", "乙"))
    other = second_generation(kb)
    assert (kb.generation() or pytest.fail()).id == 1
    revision = kb.revision()
    kb.writer().add_vectors(other, kb.chunk_ids()[:1], vectors(1, 2))
    with pytest.raises(KnowledgeBaseError, match="generation 2 has no vector of 1 chunks yet"):
        kb.writer().switch_generation(other)
    assert ((kb.generation() or pytest.fail()).id, kb.revision()) == (1, revision)
    assert fill(kb, other) == 1
    assert kb.previous_generation() is None
    kb.writer().switch_generation(other)
    answering, previous = kb.generation(), kb.previous_generation()
    assert answering is not None
    assert previous is not None
    assert (answering.id, answering.fingerprint, answering.embedder, previous.id) == (2, "other", {"_type": "x"}, 1)
    assert kb.revision() != revision


def test_a_chunk_staged_meanwhile_holds_a_switch_back(kb: KnowledgeBase) -> None:
    store(kb, "a", entry("a", "甲"))
    other = second_generation(kb)
    fill(kb, other)
    stage(kb, "b", entry("b", "乙"))
    with pytest.raises(KnowledgeBaseError, match="no vector of 1 chunks"):
        kb.writer().switch_generation(other)


def test_a_source_is_not_activated_without_vectors_of_the_generation_that_answers(kb: KnowledgeBase) -> None:
    """A switch in the middle of an ingest: what is stored after it has vectors of the old generation only."""
    store(kb, "a", entry("a", "甲"))
    writer = kb.writer()
    source_id, _ = writer.begin_source("b", STATE)
    other = second_generation(kb)
    fill(kb, other)
    writer.switch_generation(other)
    writer.add_documents(source_id, [entry("b", "乙")])
    fill(kb, 1)
    with pytest.raises(GenerationChangedError):
        writer.activate(source_id, 1)
    assert kb.source_names() == ["a"]
    fill(kb, other)
    writer.activate(source_id, other)
    assert kb.chunk_count() == 2


def test_vectors_of_two_generations_are_kept_apart(kb: KnowledgeBase) -> None:
    store(kb, "a", entry("a", *["字"] * 600))  # more than are asked for one by one
    other = second_generation(kb)
    fill(kb, other)
    assert stored(kb, 1) == [[0, 1, 0, 0]] * 600
    assert stored(kb, other) == [[0, 0, 1, 0]] * 600
    some = kb.chunk_ids()[:3]
    assert [row for _, batch in kb.vectors(other, some) for row in batch.tolist()] == [[0, 0, 1, 0]] * 3
    kb.writer().remove_sources(["a"])
    assert counts(kb)["vectors"] == 0


def test_going_back_is_another_switch(kb: KnowledgeBase) -> None:
    store(kb, "a", entry("a", "甲"))
    other = second_generation(kb)
    fill(kb, other)
    kb.writer().switch_generation(other)
    store(kb, "b", entry("b", "乙"))  # has a vector in the generation that answers only
    with pytest.raises(KnowledgeBaseError, match="generation 1 has no vector of 1 chunks"):
        kb.writer().switch_generation(1)
    fill(kb, 1)
    kb.writer().switch_generation(1)
    answering, previous = kb.generation(), kb.previous_generation()
    assert answering is not None
    assert previous is not None
    assert (answering.id, previous.id) == (1, other)
    assert stored(kb, other) == [[0, 0, 1, 0]] * 2


def test_a_dropped_generation_leaves_no_vector_and_its_number_is_not_used_again(kb: KnowledgeBase) -> None:
    store(kb, "a", entry("a", *["字"] * 2000))
    other = second_generation(kb)
    fill(kb, other)
    kb.writer().drop_generation(other)
    assert counts(kb)["vectors"] == 2000
    assert stored(kb, other) == []
    assert [made.id for made in kb.generations()] == [1]
    assert second_generation(kb) == other + 1


def test_vectors_for_a_dropped_generation_are_not_stored(kb: KnowledgeBase) -> None:
    """A run that fills it may still be on its way; nothing would ever clear them away."""
    store(kb, "a", entry("a", "甲"))
    other = second_generation(kb)
    kb.writer().drop_generation(other)
    with pytest.raises(KnowledgeBaseError, match="generation 2 was removed"):
        kb.writer().add_vectors(other, kb.chunk_ids(), vectors(1))
    assert counts(kb) == rows(1, 1, 1)


def test_the_generation_that_answers_cannot_be_dropped(kb: KnowledgeBase) -> None:
    store(kb, "a", entry("a", "甲"))
    with pytest.raises(KnowledgeBaseError, match="generation 1 answers and cannot be dropped"):
        kb.writer().drop_generation(1)
    assert kb.generation() is not None
    assert counts(kb) == rows(1, 1, 1)


def test_no_switch_to_a_generation_that_is_not_there(kb: KnowledgeBase) -> None:
    kb.writer().first_generation("fake", vectors(1)[0], None)
    with pytest.raises(KnowledgeBaseError, match="generation 9 was removed"):
        kb.writer().switch_generation(9)
    assert kb.generation() is not None


@pytest.mark.parametrize("moment", ["filling", "switching", "dropping"])
def test_killed_while_generations_change_one_of_them_answers_whole(kb: KnowledgeBase, moment: str) -> None:
    store(kb, "a", entry("a", "甲", "乙"))
    process = child(
        """
        import chains.knowledge_base_writer as module
        def killed(*_):
            os.kill(os.getpid(), signal.SIGKILL)
        writer = kb.writer()
        other = writer.add_generation("other", vectors(1)[0], None).id
        if sys.argv[2] == "filling":
            module._to_blob = killed
        fill(other)
        if sys.argv[2] == "switching":
            module._bump = killed
        writer.switch_generation(other)
        writer.give_back_space = killed
        writer.drop_generation(1)
        """,
        kb.path,
        moment,
    )
    _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, err
    answering = kb.generation()
    assert answering is not None
    assert answering.id == (2 if moment == "dropping" else 1)
    assert len(stored(kb, answering.id)) == 2
    assert integrity_problems(kb) == []


# -- threads and processes -------------------------------------------------------------------------------------------

WRITE_MANY = """
    writer = kb.writer()
    for number in range(20):
        name = f"{sys.argv[2]}-{number}"
        made = writer.first_generation("fake", vectors(1)[0], None)
        source, _ = writer.begin_source(name, SourceState(0, 1, 1, name, "s"))
        for part in range(2):
            writer.add_documents(source, [entry(f"{name}-{part}", "甲" * 50)])
        missing = kb.without_vector(made.id, source_id=source)
        writer.add_vectors(made.id, missing, vectors(len(missing)))
        writer.activate(source, 1)
"""


def test_processes_that_write_at_once_lose_nothing_and_readers_see_whole_sources(tmp_path: Path) -> None:
    with KnowledgeBase(tmp_path / "kb", create=True) as kb:
        writers = [child(WRITE_MANY, kb.path, name) for name in "xyz"]
        while any(writer.poll() is None for writer in writers):
            for info in kb.sources():
                assert (info.documents, info.chunks, info.characters) == (2, 2, 100)
        for writer in writers:
            finish(writer)
        assert len(kb.source_names()) == 60
        assert counts(kb) == rows(60, 120, 120)
        with sqlite3.connect(kb.path / "kb.sqlite") as connection:
            assert connection.execute("SELECT COUNT(*) FROM generations").fetchone() == (1,)
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_reader_is_not_kept_waiting_by_a_writer(kb: KnowledgeBase) -> None:
    store(kb, "a", entry("a", "甲"))
    process = child(
        """
        with kb.writer()._transaction() as run:
            run("DELETE FROM chunks")
            print("in the middle", flush=True)
            time.sleep(30)
        """,
        kb.path,
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "in the middle\n"
        started = time.monotonic()
        assert [chunk.text for chunk in kb.chunks(kb.chunk_ids().tolist()).values()] == ["甲"]
        assert time.monotonic() - started < 5
    finally:
        process.kill()
        process.communicate()
    assert kb.chunk_count() == 1
    store(kb, "b", entry("b", "乙"))  # the lock of the killed writer is free


KILLED = """
    writer = kb.writer()
    source, stored = writer.begin_source("big", SourceState(0, 1, 1, "hash", "s"))
    for number in range(stored, 6):
        document = entry(f"big-{number}", "甲" * 3000)
        if sys.argv[2] == "inside" and number == 3:
            document.chunks[0].metadata.update(late=Deadly())
        writer.add_documents(source, [document])
        if sys.argv[2] == "between" and number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
    fill()
    if sys.argv[2] == "before activate":
        os.kill(os.getpid(), signal.SIGKILL)
    if sys.argv[2] == "inside activate":
        chains.knowledge_base_writer._bump = lambda run, *_: os.kill(os.getpid(), signal.SIGKILL)
    writer.activate(source, 1)
"""
# json.dumps of this value ends the process: between the statements of one transaction
DEADLY = """
import chains.knowledge_base_writer
class Deadly: pass
def dumps(value, **options):
    if "late" in value:
        os.kill(os.getpid(), signal.SIGKILL)
    return json_dumps(value, **options)
json_dumps, chains.knowledge_base_writer.json.dumps = chains.knowledge_base_writer.json.dumps, dumps
"""


@pytest.mark.parametrize(
    ("moment", "stored"), [("inside", 3), ("between", 4), ("before activate", 6), ("inside activate", 6)]
)
def test_a_killed_writer_leaves_the_old_version_and_what_it_committed(
    kb: KnowledgeBase, moment: str, stored: int
) -> None:
    store(kb, "big", entry("old", "旧"))
    process = child(DEADLY + textwrap.dedent(KILLED), kb.path, moment)
    _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, err
    assert [chunk.text for chunk in kb.chunks(range(99)).values()] == ["旧"]
    writer = kb.writer()
    source_id, found = writer.begin_source("big", SourceState(0, 1, 1, "hash", "s"))
    assert found == stored
    for number in range(found, 6):
        writer.add_documents(source_id, [entry(f"big-{number}", "甲")])
    fill(kb, 1)
    writer.activate(source_id, 1)
    assert counts(kb) == rows(1, 6, 6)
    assert sorted(chunk.key for chunk in kb.chunks(kb.chunk_ids().tolist()).values()) == [
        f"big-{number}-0" for number in range(6)
    ]
    with sqlite3.connect(kb.path / "kb.sqlite") as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_full_disk_is_named_and_what_was_committed_stays(kb: KnowledgeBase) -> None:
    store(kb, "a", entry("a", "甲"))
    kb.close()
    process = child(
        """
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, 1_500_000))
        try:
            writer = kb.writer()
            for number in range(100):
                source, _ = writer.begin_source(f"big{number}", SourceState(0, 1, 1, "hash", "s"))
                writer.add_documents(source, [entry(f"big{number}", "甲" * 5000)])
                fill()
                writer.activate(source, 1)
                print(f"big{number}", flush=True)
        except KnowledgeBaseError as error:
            print(error.en)
            print(kb.source_names())
        """,
        kb.path,
    )
    *written, message, names = finish(process).splitlines()
    assert "the disk may be full" in message
    assert written
    assert names == str(sorted(["a", *written]))
    assert kb.source_names() == sorted(["a", *written])
    store(kb, "b", entry("b", "乙"))
    assert kb.chunks_by_key(["b-0"])


# -- the vector store's writes -----------------------------------------------------------------------------------


@pytest.fixture
def python_store(kb: KnowledgeBase) -> FaissVectorStore:
    made = FaissVectorStore(DeterministicFakeEmbedding(size=8), kb)
    made.add_texts(["旧"], ids=["a"])
    made.save_cache()
    return made


@pytest.mark.parametrize("metadata", [{"path": Path("x")}, {"source": "\udcb2"}], ids=["not JSON", "not UTF-8"])
def test_a_document_that_cannot_be_stored_does_not_take_the_old_one_along(
    python_store: FaissVectorStore, metadata: dict[str, Any]
) -> None:
    with pytest.raises((TypeError, ValueError, KnowledgeBaseError)):
        python_store.add_texts(["新"], [metadata], ids=["a"])
    assert [document.page_content for document in python_store.get_by_ids(["a"])] == ["旧"]


def test_a_document_is_stored_and_found_or_neither(
    python_store: FaissVectorStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if killed before readers are told: every cache would count as current for ever."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(knowledge_base_writer, "_bump", killed)
    with pytest.raises(KeyboardInterrupt):
        python_store.add_texts(["新"], ids=["b"])
    monkeypatch.undo()
    found = python_store.similarity_search("新", k=9)
    assert len(found) == python_store.knowledge_base.chunk_count()


def test_documents_without_a_source_are_listed_under_one_name(python_store: FaissVectorStore) -> None:
    assert python_store.knowledge_base.source_names() == [UNNAMED_SOURCE]


def test_deleting_everything_takes_staged_sources_too(python_store: FaissVectorStore) -> None:
    stage(python_store.knowledge_base, "half.txt", entry("half", "写了一半"))
    python_store.delete()
    assert counts(python_store.knowledge_base) == rows(0, 0, 0)


# -- space ---------------------------------------------------------------------------------------------------------


def test_removing_waits_for_no_reader_and_the_space_comes_back_after_him(kb: KnowledgeBase) -> None:
    for name in ("a", "b"):
        source_id, _ = kb.writer().begin_source(name, STATE)
        kb.writer().add_documents(source_id, [entry(name, *[f"第{n}段{name}" * 400 for n in range(40)])])
        made = kb.writer().first_generation("fake", vectors(1)[0], None)
        kb.writer().activate(source_id, made.id)
    kb.writer().give_back_space()
    database, log = kb.path / "kb.sqlite", kb.path / "kb.sqlite-wal"
    before = database.stat().st_size
    reader = sqlite3.connect(database, isolation_level=None)
    reader.execute("BEGIN")
    assert reader.execute("SELECT COUNT(*) FROM sources").fetchone() == (2,)
    remover = threading.Thread(target=lambda: kb.writer().remove_sources(["a"]))
    remover.start()
    remover.join(20)  # it waited for a minute, and every writer behind it
    assert not remover.is_alive()
    assert kb.source_names() == ["b"]
    assert reader.execute("SELECT COUNT(*) FROM sources").fetchone() == (2,)
    reader.close()
    kb.writer().touch(1, STATE)  # the next write, whatever it is
    assert log.stat().st_size == 0
    assert database.stat().st_size < before
    assert "第7段a".encode() not in database.read_bytes()


def test_a_write_waits_for_other_writers_as_before_once_space_was_given_back(kb: KnowledgeBase) -> None:
    waiting = kb._number("PRAGMA busy_timeout")
    kb.writer().give_back_space()
    assert kb._number("PRAGMA busy_timeout") == waiting == 60_000


def test_a_retitled_content_is_shown_anew_under_the_same_keys(kb: KnowledgeBase) -> None:
    made = kb.writer().first_generation("fake", vectors(1)[0], None)
    source_id, _ = kb.writer().begin_source("a", STATE)
    kb.writer().add_documents(source_id, [entry("a", "一。", "二。")])
    kb.writer().add_vectors(made.id, kb.without_vector(made.id), vectors(2))
    kb.writer().activate(source_id, made.id)
    revision, old = kb.revision(), kb.chunk_ids()
    keys = [chunk.key for chunk in kb.chunks(old.tolist()).values()]
    kb.writer().retitle(1, "新名", made.id, vectors(2, axis=1))
    new = kb.chunk_ids()
    changes = kb.changes_since(revision)
    assert changes is not None
    assert (changes.shown.tolist(), changes.hidden.tolist()) == (new.tolist(), old.tolist())
    assert set(new.tolist()).isdisjoint(old.tolist())
    assert [(chunk.key, chunk.title) for chunk in kb.chunks(new.tolist()).values()] == [(key, "新名") for key in keys]
    ((ids, stored),) = kb.vectors(made.id, new)
    assert ids.tolist() == new.tolist()
    assert stored.tolist() == vectors(2, axis=1).tolist()
    assert integrity_problems(kb) == []
    kb.writer().retitle(1, "不合", made.id, vectors(3))  # made for what it was before: nothing happens
    assert kb.chunk_ids().tolist() == new.tolist()
