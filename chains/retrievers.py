"""Retrievers over a knowledge base: nearest vectors, BM25, and both fused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.vectorstores import VectorStore
from pydantic import ConfigDict, Field

from chains.extraction import coverage
from chains.fulltext import FullTextIndex
from chains.knowledge_base import Ids, StoredChunk
from chains.vectorstores import FaissVectorStore
from loaders.splitters import context_lines

# Reciprocal rank fusion's constant, Cormack, Clarke & Buettcher 2009.
_RRF = 60

Ranking = list[tuple[int, float]]


class ChunkRetriever(BaseRetriever):
    """Common part: ranks chunk ids, then reads the chunks and tells how relevant each is.

    A document's metadata is the chunk's own, with `source`, `document_id`, `start`, `end` (offsets into the source
    document's normalised text) and `score`, the relevance in [0, 1], laid over it.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    store: FaissVectorStore
    top_k: int = Field(default=5, ge=1)
    filter: dict[str, Any] | None = None

    def rank(self, query: str, k: int) -> Ranking:
        """(chunk id, score) of the k best chunks, best first; scores compare within one ranking only."""
        raise NotImplementedError

    def _allowed(self) -> Ids | None:
        return None if self.filter is None else self.store.knowledge_base.matching_ids(self.filter)

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        ranking = self.rank(query, self.top_k)
        chunks = self.store.knowledge_base.chunks((i for i, _ in ranking), self.filter)
        return [_with_place(chunks[i], query) for i, _ in ranking if i in chunks]


class DenseRetriever(ChunkRetriever):
    """Nearest vectors."""

    def rank(self, query: str, k: int) -> Ranking:
        """By cosine."""
        return self.store.search_ids(self.store.embed_query(query), k, self.filter)


class LexicalRetriever(ChunkRetriever):
    """BM25 over Chinese terms."""

    fulltext: FullTextIndex

    def rank(self, query: str, k: int) -> Ranking:
        """By BM25."""
        return self.fulltext.search(query, k, self._allowed())


class HybridRetriever(ChunkRetriever):
    """Nearest vectors and BM25, fused."""

    fulltext: FullTextIndex
    fusion: Literal["weighted", "rrf"] = "weighted"
    dense_weight: float = 0.5
    support: float = 0.3
    fetch: int = 100

    def rank(self, query: str, k: int) -> Ranking:
        """By fused score, raised where other chunks of the same document were found too."""
        fetch = max(self.fetch, k)
        vector = self.store.embed_query(query)
        legs = [
            self.fulltext.search(query, fetch, self._allowed()),
            self.store.search_ids(vector, fetch, self.filter),
        ]
        weights = [1 - self.dense_weight, self.dense_weight]
        fused = fuse_ranks(legs, weights) if self.fusion == "rrf" else fuse_scores(legs, weights)
        documents = self.store.knowledge_base.document_ids(i for i, _ in fused)
        return with_support(fused, documents, self.support)[:k]


def fuse_ranks(rankings: Sequence[Iterable[tuple[int, float]]], weights: Sequence[float]) -> Ranking:
    """Rankings fused by weighted reciprocal rank, best first, ties by id.

    Score of an id: sum over rankings of weight / (60 + rank), ranks from 1 (Cormack, Clarke & Buettcher, SIGIR 2009).
    """
    scores: dict[int, float] = {}
    for ranking, weight in zip(rankings, weights, strict=True):
        for rank, (chunk, _) in enumerate(ranking, 1):
            scores[chunk] = scores.get(chunk, 0.0) + weight / (_RRF + rank)
    return sorted(scores.items(), key=lambda item: (-item[1], item[0]))


def fuse_scores(rankings: Sequence[Sequence[tuple[int, float]]], weights: Sequence[float]) -> Ranking:
    """Rankings fused by weighted score, each ranking's scores divided by its best one; best first, ties by id.

    Keeps what ranks throw away: by how much the first hit leads. A ranking without a positive score adds nothing.
    """
    scores: dict[int, float] = {}
    for ranking, weight in zip(rankings, weights, strict=True):
        best = max((score for _, score in ranking), default=0.0)
        if best > 0:
            for chunk, score in ranking:
                scores[chunk] = scores.get(chunk, 0.0) + weight * score / best
    return sorted(scores.items(), key=lambda item: (-item[1], item[0]))


def with_support(ranking: Ranking, documents: Mapping[int, int], decay: float) -> Ranking:
    """Scores raised by those of the other chunks of the same document: `decay` of the best one, its square of the next.

    A document that several chunks speak for is more likely to be the one meant; the sum stays bounded however long
    the document is. Chunks without a document (removed meanwhile) are dropped. Best first, ties by id.
    """
    by_document: dict[int, list[float]] = {}
    for chunk, score in ranking:
        if chunk in documents:
            by_document.setdefault(documents[chunk], []).append(score)
    raised = []
    for chunk, score in ranking:
        if chunk in documents:
            others = sorted(by_document[documents[chunk]], reverse=True)
            others.remove(score)
            support = sum(other * decay**place for place, other in enumerate(others, 1))
            raised.append((chunk, score + support))
    return sorted(raised, key=lambda item: (-item[1], item[0]))


class StoreRetriever(BaseRetriever):
    """The `top_k` nearest documents of any LangChain vector store."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    vectorstore: VectorStore
    top_k: int = Field(default=5, ge=1)

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        return self.vectorstore.similarity_search(query, k=self.top_k)


def relevance(query: str, document: Document) -> float:
    """How much of the question's information a document covers, title and headings included, in [0, 1]."""
    return coverage(query, document.page_content, " ".join(context_lines(document)))


def _with_place(chunk: StoredChunk, query: str) -> Document:
    document = chunk.document()
    place: dict[str, Any] = {
        "source": chunk.source,
        "document_id": chunk.document_id,
        "start": chunk.start,
        "end": chunk.end,
        "score": round(relevance(query, document), 4),
    }
    if chunk.duplicates:  # the same text stands elsewhere, too
        place["also_in"] = [
            {key: other[key] for key in ("source", "id", "title") if key in other} for other in chunk.duplicates
        ]
    return Document(id=document.id, page_content=chunk.text, metadata={**document.metadata, **place})
