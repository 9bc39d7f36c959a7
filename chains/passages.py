"""Small to big: hits of one document, joined with each other and with the chunks around them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from chains.knowledge_base import KnowledgeBase, StoredChunk

_PLACES = ("page", "slide", "sheet", "headings", "table_header")


@dataclass
class _Span:
    """Neighbouring chunks of a document, `chunks[first : last + 1]`."""

    rank: int
    first: int
    last: int

    def place(self, chunks: Sequence[StoredChunk]) -> tuple[int, int]:
        """(start, end) in the document's text."""
        return chunks[self.first].start, max(chunk.end for chunk in chunks[self.first : self.last + 1])


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

    Hits that overlap become one passage, hits that touch do if it is not longer than `budget`. Then each passage, the
    best first, takes in neighbouring chunks, following and preceding ones in turn, as long as it stays within the
    budget, on its slide or sheet, and clear of the others. `document_text[start:end]` is the text of each.

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
    spans = _joined([_Span(ranks[c.id], n, n) for n, c in enumerate(chunks) if c.id in ranks], chunks, budget)
    for span in sorted(spans, key=lambda span: span.rank):
        _grow(span, spans, chunks, budget)
        start, end = span.place(chunks)
        parts = tuple(chunks[span.first : span.last + 1])
        yield span.rank, Passage(hits[span.rank], start, end, text[start:end], parts)


def _joined(hits: Sequence[_Span], chunks: Sequence[StoredChunk], budget: int) -> list[_Span]:
    spans: list[_Span] = []
    for hit in hits:
        if spans and spans[-1].last + 1 >= hit.first:
            start, end = spans[-1].place(chunks)
            overlap = chunks[hit.first].start < end
            fits = chunks[hit.first].end - start <= budget and _same_sheet(chunks[hit.first], chunks[spans[-1].last])
            if overlap or fits:
                spans[-1].last = hit.last
                spans[-1].rank = min(spans[-1].rank, hit.rank)
                continue
        spans.append(hit)
    return spans


def _grow(span: _Span, spans: Sequence[_Span], chunks: Sequence[StoredChunk], budget: int) -> None:
    taken = [other.place(chunks) for other in spans if other is not span]
    sides = [1, -1]
    while sides:
        for side in list(sides):
            wider = _Span(span.rank, span.first - (side < 0), span.last + (side > 0))
            if not _may_be(wider, span, chunks, budget, taken):
                sides.remove(side)
                continue
            span.first, span.last = wider.first, wider.last


def _may_be(
    wider: _Span, span: _Span, chunks: Sequence[StoredChunk], budget: int, taken: Sequence[tuple[int, int]]
) -> bool:
    if wider.first < 0 or wider.last >= len(chunks):
        return False
    start, end = wider.place(chunks)
    edge, new = (wider.first + 1, wider.first) if wider.first < span.first else (wider.last - 1, wider.last)
    clear = all(end <= low or high <= start for low, high in taken)
    return end - start <= budget and clear and _same_sheet(chunks[edge], chunks[new])


def _same_sheet(one: StoredChunk, other: StoredChunk) -> bool:
    return all(one.metadata.get(key) == other.metadata.get(key) for key in ("slide", "sheet"))
