"""Small to big: which chunks become one passage, by hand; and for any document that nothing is lost or repeated."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chains.knowledge_base import KnowledgeBase, SourceState, StoredChunk
from chains.knowledge_base_writer import NewChunk, NewDocument
from chains.passages import Passage, join_neighbours


@pytest.fixture
def kb(tmp_path: Path) -> Iterator[KnowledgeBase]:
    with KnowledgeBase(tmp_path / "kb", create=True) as knowledge_base:
        yield knowledge_base


def add(
    kb: KnowledgeBase,
    text: str,
    spans: Sequence[tuple[int, int]],
    places: Sequence[dict[str, Any]] = (),
    name: str = "s",
) -> list[StoredChunk]:
    """A document cut at the spans, given back as its chunks in text order."""
    writer = kb.writer()
    made = kb.generation() or writer.first_generation("fake", np.array([1, 0], np.float32), None)
    places = places or [{}] * len(spans)
    chunks = [
        NewChunk(f"{name}-{n}", start, end, text[start:end], place)
        for n, ((start, end), place) in enumerate(zip(spans, places, strict=True))
    ]
    source_id, _ = writer.begin_source(name, SourceState(0, 1, 1, name, "s"))
    writer.add_documents(source_id, [NewDocument(name, "", text, {}, chunks)])
    ids = kb.without_vector(made.id, source_id=source_id)
    writer.add_vectors(made.id, ids, np.ones((len(ids), 2), np.float32))
    writer.activate(source_id, made.id)
    stored = kb.chunks(kb.chunk_ids_of(name).tolist())
    return sorted(stored.values(), key=lambda chunk: chunk.start)


TEXT = "零一二三四五六七八九" * 5
TENS = [(start, start + 10) for start in range(0, 50, 10)]


def places(passages: Sequence[Passage]) -> list[tuple[int, int]]:
    return [(passage.start, passage.end) for passage in passages]


@pytest.mark.parametrize(
    ("hits", "budget", "expected"),
    [
        ([2], 10, [(20, 30)]),  # nothing fits beside it
        ([2], 9, [(20, 30)]),  # a hit may be longer than the budget
        ([2], 20, [(20, 40)]),  # what follows comes first
        ([2], 30, [(10, 40)]),  # then what precedes
        ([2], 1000, [(0, 50)]),
        ([4], 30, [(20, 50)]),  # at the end there is only one side
        ([0], 30, [(0, 30)]),
        ([1, 2], 20, [(10, 30)]),  # they touch and fit
        ([2, 1], 20, [(10, 30)]),
        ([1, 2], 10, [(10, 20), (20, 30)]),  # they touch and do not fit: two passages, in order of rank
        ([2, 1], 10, [(20, 30), (10, 20)]),
        ([0, 4], 20, [(0, 20), (30, 50)]),
        ([0, 4], 30, [(0, 30), (30, 50)]),  # the better one had the choice
        ([4, 0], 30, [(20, 50), (0, 20)]),
        ([0, 4], 50, [(0, 50)]),  # grown until they met
        ([0, 2, 4], 30, [(0, 30), (30, 50)]),
    ],
)
def test_hits_grow_by_hand(kb: KnowledgeBase, hits: list[int], budget: int, expected: list[tuple[int, int]]) -> None:
    chunks = add(kb, TEXT, TENS)
    assert places(join_neighbours([chunks[n] for n in hits], kb, budget)) == expected


def test_chunks_that_overlap_are_joined_whatever_the_budget_and_text_is_not_repeated(kb: KnowledgeBase) -> None:
    chunks = add(kb, TEXT, [(0, 20), (15, 35), (30, 50)])
    (passage,) = join_neighbours(chunks[:2], kb, 10)
    assert (passage.start, passage.end, passage.text) == (0, 35, TEXT[:35])
    first, last = join_neighbours([chunks[0], chunks[2]], kb, 40)
    assert (first.end, last.start) == (20, 30)  # the chunk between them would share text with one or the other


def test_a_passage_stays_on_its_slide_and_sheet(kb: KnowledgeBase) -> None:
    chunks = add(kb, TEXT, TENS, [{"slide": 1}, {"slide": 1}, {"slide": 2}, {"slide": 2}, {"slide": 3}])
    assert places(join_neighbours([chunks[2]], kb, 1000)) == [(20, 40)]
    assert places(join_neighbours([chunks[1], chunks[2]], kb, 1000)) == [(0, 20), (20, 40)]


def test_a_passage_tells_where_each_part_stands(kb: KnowledgeBase) -> None:
    chunks = add(kb, TEXT, TENS[:3], [{"page": 1}, {"page": 2, "headings": ["甲"]}, {"page": 2}])
    (passage,) = join_neighbours([chunks[1]], kb, 1000)
    assert passage.places() == [
        {"start": 0, "page": 1}, {"start": 10, "page": 2, "headings": ["甲"]}, {"start": 20, "page": 2},
    ]  # fmt: skip
    assert passage.hit == chunks[1]


def test_documents_are_kept_apart_and_ranked_by_their_best_hit(kb: KnowledgeBase) -> None:
    one = add(kb, TEXT, TENS, name="one")
    two = add(kb, TEXT[::-1], TENS, name="two")
    passages = join_neighbours([two[0], one[0], two[1]], kb, 20)
    assert [(p.hit.source, p.start, p.end) for p in passages] == [("two", 0, 20), ("one", 0, 20)]
    assert passages[0].text == TEXT[::-1][:20]


def test_nothing_makes_nothing_and_what_is_gone_is_left_out(kb: KnowledgeBase) -> None:
    assert join_neighbours([], kb, 100) == []
    chunks = add(kb, TEXT, TENS)
    kb.writer().remove_sources(["s"])
    assert join_neighbours(chunks, kb, 100) == []


@pytest.mark.parametrize("seed", range(30))
def test_whatever_the_document_every_hit_is_covered_once_and_offsets_are_exact(kb: KnowledgeBase, seed: int) -> None:
    draw = random.Random(seed)
    text = "".join(draw.choices("甲乙丙丁。\n", k=draw.randint(20, 200)))
    overlap = draw.choice([0, 0, 3])
    cuts = sorted({0, len(text), *draw.sample(range(1, len(text)), draw.randint(1, 8))})
    spans = [(max(0, start - overlap), end) for start, end in itertools.pairwise(cuts)]
    chunks = add(kb, text, spans)
    hits = draw.sample(chunks, draw.randint(1, len(chunks)))
    budget = draw.randint(1, 150)
    passages = join_neighbours(hits, kb, budget)
    for hit in hits:
        assert sum(p.start <= hit.start and hit.end <= p.end for p in passages) == 1
    for passage in passages:
        assert passage.text == text[passage.start : passage.end]
        assert passage.end - passage.start <= max(budget, sum(hit.end - hit.start for hit in hits))
    in_text = sorted(places(passages))
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(in_text))
    best = [min(hits.index(part) for part in p.parts if part in hits) for p in passages]
    assert best == sorted(best)


@pytest.mark.parametrize(
    ("between", "joined"), [("", True), ("\n", True), ("\n    ", True), ("删", False), ("　", False)]
)
def test_chunks_are_joined_over_white_space_only(kb: KnowledgeBase, between: str, joined: bool) -> None:
    """A character that no chunk holds may have been removed; the ideographic space stands where one was."""
    text = f"零一二三四{between}五六七八九"
    first, last = add(kb, text, [(0, 5), (len(text) - 5, len(text))])
    assert len(join_neighbours([first, last], kb, 100)) == (1 if joined else 2)
    assert join_neighbours([first], kb, 100)[0].text == (text if joined else "零一二三四")
