"""The list of changes: from any older state it leads to what readers see now, or says that it does not know."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from chains import knowledge_base, knowledge_base_writer
from chains.id_runs import count_of_runs, from_runs, to_runs
from chains.knowledge_base import KnowledgeBase, SourceState
from chains.knowledge_base_writer import NewChunk, NewDocument

VECTOR = np.array([1, 0, 0, 0], np.float32)


@pytest.fixture
def kb(tmp_path: Path) -> Iterator[KnowledgeBase]:
    with KnowledgeBase(tmp_path / "kb", create=True) as opened:
        opened.writer().first_generation("fake", VECTOR, None)
        yield opened


def document(name: str, chunks: int = 2) -> NewDocument:
    """Documents of the same name share their content."""
    text = "字" * chunks
    return NewDocument(name, "", text, {}, [NewChunk(f"{name}-{n}", n, n + 1, "字", {}) for n in range(chunks)])


def stage(kb: KnowledgeBase, source: str, *documents: NewDocument, version: str = "1") -> int:
    writer = kb.writer()
    number, _ = writer.begin_source(source, SourceState(0, 1, 1, version, "s"))
    writer.add_documents(number, documents)
    missing = kb.without_vector(1, source_id=number)
    writer.add_vectors(1, missing, np.tile(VECTOR, (len(missing), 1)))
    return number


def store(kb: KnowledgeBase, source: str, *documents: NewDocument, version: str = "1") -> None:
    kb.writer().activate(stage(kb, source, *documents, version=version), 1)


def followed(kb: KnowledgeBase, token: str, ids: list[int]) -> list[int]:
    """The ids of an older state, brought up to date by the list of changes."""
    changes = kb.changes_since(token)
    assert changes is not None
    assert changes.revision == kb.revision()
    assert not set(changes.shown.tolist()) & set(ids)
    assert set(changes.hidden.tolist()) <= set(ids)
    return sorted(set(ids) - set(changes.hidden.tolist()) | set(changes.shown.tolist()))


def disturb(kb: KnowledgeBase, chance: random.Random, staged: dict[str, int]) -> None:
    """One change of any kind, over few names, so that contents are shared, replaced and removed in every order."""
    writer, source = kb.writer(), chance.choice("abc")
    documents = [document(chance.choice("xyz"), 2) for _ in range(chance.randint(1, 2))]
    match chance.randrange(6):
        case 0:
            staged[source] = stage(kb, source, *documents, version=str(chance.random()))
        case 1 if source in staged:
            writer.activate(staged.pop(source), 1)
        case 2:
            writer.remove_sources([source, source])
            staged.pop(source, None)
        case 3:
            keys = [chunk.key for chunk in kb.chunks(kb.chunk_ids().tolist()).values()]
            writer.remove_chunks(chance.sample(keys, min(len(keys), 2)))
            staged.clear()  # those that shared the chunks are gone; the others are begun anew
            for name in kb.staged_sources():
                writer.drop_staged(name)
        case 4:
            key = f"python-{chance.randrange(3)}"
            entry = NewDocument(f"id-{key}", "", "字", {}, [NewChunk(key, 0, 1, "字", {})])
            writer.replace_chunks({"(python)": [entry]}, 1, VECTOR[None])
        case _:
            store(kb, source, *documents, version=str(chance.random()))
            staged.pop(source, None)


@pytest.mark.parametrize("seed", range(8))
def test_from_any_older_state_it_leads_to_what_readers_see_now(kb: KnowledgeBase, seed: int) -> None:
    chance, staged = random.Random(seed), dict[str, int]()
    store(kb, "a", document("x"))
    states = {kb.revision(): kb.chunk_ids().tolist()}
    for _ in range(40):
        disturb(kb, chance, staged)
        token, ids = kb.snapshot()
        assert (token, ids.tolist()) == (kb.revision(), kb.chunk_ids().tolist())
        assert states.setdefault(token, ids.tolist()) == ids.tolist()  # no change without a new revision
        for older, held in states.items():
            assert followed(kb, older, held) == ids.tolist()
    assert len(states) > 20


def test_a_state_that_is_current_has_no_changes(kb: KnowledgeBase) -> None:
    store(kb, "a", document("x"))
    assert followed(kb, kb.revision(), [1, 2]) == [1, 2]


def test_a_content_hidden_with_its_last_source_comes_back_with_the_next(kb: KnowledgeBase) -> None:
    store(kb, "a", document("x"))
    token = kb.revision()
    staged = stage(kb, "b", document("x"))
    kb.writer().remove_sources(["a"])
    assert followed(kb, token, [1, 2]) == []
    kb.writer().activate(staged, 1)
    changes = kb.changes_since(token)
    assert changes is not None
    assert (changes.shown.tolist(), changes.hidden.tolist()) == ([], [])  # hidden and shown again


@pytest.mark.parametrize("token", ["", "0" * 32])
def test_changes_since_an_unknown_state_are_not_known(kb: KnowledgeBase, token: str) -> None:
    store(kb, "a", document("x"))
    assert kb.changes_since(token) is None


def test_changes_older_than_what_is_kept_are_not_known(kb: KnowledgeBase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knowledge_base_writer, "_REVISIONS_KEPT", 3)
    store(kb, "a", document("x"))
    first = kb.revision()
    for name in "bcd":
        store(kb, name, document(name))
    assert kb.changes_since(first) is None


def test_a_switch_of_the_vectors_has_to_be_looked_at_whole(kb: KnowledgeBase) -> None:
    store(kb, "a", document("x"))
    token = kb.revision()
    generation = kb.writer().add_generation("other", VECTOR, None)
    kb.writer().add_vectors(generation.id, kb.chunk_ids(), np.tile(VECTOR, (2, 1)))
    kb.writer().switch_generation(generation.id)
    assert kb.changes_since(token) is None


def test_very_big_changes_are_not_listed(kb: KnowledgeBase, monkeypatch: pytest.MonkeyPatch) -> None:
    store(kb, "a", document("x"))
    token = kb.revision()
    monkeypatch.setattr(knowledge_base_writer, "_FOLLOWED_CONTENTS", 2)
    store(kb, "b", document("p"), document("q"))
    assert followed(kb, token, [1, 2]) == [1, 2, 3, 4, 5, 6]
    monkeypatch.setattr(knowledge_base, "_FOLLOWED", 3)
    assert kb.changes_since(token) is None
    monkeypatch.undo()
    monkeypatch.setattr(knowledge_base_writer, "_FOLLOWED_CONTENTS", 2)
    store(kb, "c", document("r"), document("s"), document("t"))
    assert kb.changes_since(token) is None
    assert kb.snapshot()[1].tolist() == list(range(1, 13))


@pytest.mark.parametrize("ids", [[], [5], [1, 2, 3], [3, 1, 2, 9, 11, 12], [2**40, 1], [7, 7]])
def test_runs_are_the_ids_they_were_made_of(ids: list[int]) -> None:
    blob = to_runs(ids)
    assert from_runs(blob).tolist() == sorted(set(ids))
    assert count_of_runs(blob) == len(set(ids))


def test_consecutive_ids_take_no_more_room_than_two() -> None:
    assert len(to_runs(range(1, 100_000))) == len(to_runs([4, 5])) == 16
