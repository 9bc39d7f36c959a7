"""Small to big: hits of one document, joined with each other and with the chunks around them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from chains.knowledge_base import KnowledgeBase, StoredChunk
from chains.knowledge_base_blanking import BLANK

_PLACES = ("page", "slide", "sheet", "headings", "table_header")


@dataclass(frozen=True)
class _Span:
    """Neighbouring chunks of a document, `chunks[first : last + 1]`; `rank` is that of the best hit among them."""

    rank: int
    first: int
    last: int

    def joined(self, other: _Span) -> _Span:
        """Both as one."""
        return _Span(min(self.rank, other.rank), min(self.first, other.first), max(self.last, other.last))


@dataclass(frozen=True)
class Passage:
    """A stretch of a document's text that holds one or more hits."""

    hit: StoredChunk
    """the best of them"""
    start: int
    end: int
    text: str
    parts: tuple[StoredChunk, ...]
    """the chunks it is made of, in text order"""

    def places(self) -> list[dict[str, object]]:
        """Where each part starts and stands: page, slide, sheet, headings."""
        return [
            {"start": part.start, **{key: part.metadata[key] for key in _PLACES if key in part.metadata}}
            for part in self.parts
        ]


def join_neighbours(hits: Sequence[StoredChunk], knowledge_base: KnowledgeBase, budget: int) -> list[Passage]:
    """Passages that hold all hits, in the order of their best ones; no character of a document stands in two of them.

    Hits that overlap become one passage, and so do those that touch if it fits into the budget; white space may be
    between them, but nothing that is no chunk's any more. Then each passage, the best first, takes in what is next to
    it, following and preceding chunks in turn and other passages whole, as long as it stays within the budget and on
    its slide or sheet. `document_text[start:end]` is the text of each.

    Args:
        hits: chunks, best first.
        knowledge_base: that holds them.
        budget: characters of a passage, at most; a hit, or hits that overlap, may be longer.
    """
    ranks = {hit.id: rank for rank, hit in enumerate(hits)}
    passages: list[tuple[int, Passage]] = []
    for document in dict.fromkeys(hit.document_id for hit in hits):
        chunks = knowledge_base.neighbours(document)
        text = knowledge_base.document_text(document)
        if text is not None:  # else removed meanwhile
            passages.extend(_of_document(chunks, ranks, text, budget, hits))
    return [passage for _, passage in sorted(passages, key=lambda found: found[0])]


def _of_document(
    chunks: Sequence[StoredChunk], ranks: Mapping[int, int], text: str, budget: int, hits: Sequence[StoredChunk]
) -> Iterator[tuple[int, Passage]]:
    for span in _spans(chunks, ranks, text, budget):
        start, end = _place(span, chunks)
        parts = tuple(chunks[span.first : span.last + 1])
        yield span.rank, Passage(hits[span.rank], start, end, text[start:end], parts)


def _spans(chunks: Sequence[StoredChunk], ranks: Mapping[int, int], text: str, budget: int) -> list[_Span]:
    """The passages of one document as spans of its chunks."""
    spans: list[_Span] = []
    for hit in (_Span(ranks[chunk.id], n, n) for n, chunk in enumerate(chunks) if chunk.id in ranks):
        if spans and _belong(spans[-1], hit, chunks, text, budget):
            hit = spans.pop().joined(hit)
        spans.append(hit)
    for rank in sorted(span.rank for span in spans):
        span = next((span for span in spans if span.rank == rank), None)
        if span is not None:  # else a better one has taken it in
            others = [other for other in spans if other is not span]
            spans = _grown(span, others, chunks, text, budget)
    return spans


def _belong(before: _Span, hit: _Span, chunks: Sequence[StoredChunk], text: str, budget: int) -> bool:
    """Whether a hit overlaps what stands before it, or touches it within the budget."""
    start, end = _place(before, chunks)
    touch = before.last + 1 == hit.first and _adjoin(chunks[before.last], chunks[hit.first], text)
    return chunks[hit.first].start < end or (touch and chunks[hit.first].end - start <= budget)


def _grown(span: _Span, others: list[_Span], chunks: Sequence[StoredChunk], text: str, budget: int) -> list[_Span]:
    """The span with what it can take in, and those of the others that are left."""
    sides = [1, -1]
    while sides:
        for side in list(sides):
            edge = span.last if side > 0 else span.first
            beside = edge + side
            if not 0 <= beside < len(chunks) or not _adjoin(chunks[edge], chunks[beside], text):
                sides.remove(side)
                continue
            met = next((other for other in others if other.first <= beside <= other.last), None)
            wider = span.joined(met or _Span(span.rank, beside, beside))
            start, end = _place(wider, chunks)
            left = [other for other in others if other is not met]
            if end - start > budget or any(_overlap((start, end), _place(other, chunks)) for other in left):
                sides.remove(side)
                continue
            span, others = wider, left
    return [span, *others]


def _place(span: _Span, chunks: Sequence[StoredChunk]) -> tuple[int, int]:
    """(start, end) in the document's text."""
    return chunks[span.first].start, max(chunk.end for chunk in chunks[span.first : span.last + 1])


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def _adjoin(one: StoredChunk, other: StoredChunk, text: str) -> bool:
    """Whether two chunks of a document follow each other, without a removed one between, on the same slide or sheet."""
    between = text[min(one.end, other.end) : max(one.start, other.start)]
    if between.strip() or BLANK in between:
        return False
    return all(one.metadata.get(key) == other.metadata.get(key) for key in ("slide", "sheet"))
