"""The passages an embedder ranks highest for queries, many queries at once: what negatives are chosen from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import numpy.typing as npt
from langchain_core.embeddings import Embeddings

from chains.embeddings import Vectors, embed_documents, embed_query, unit_length
from finetune.data.questions import Passage

_PASSAGES_AT_ONCE = 1024
_QUERIES_AT_ONCE = 256
_TRAINING_PER_LIST = 64  # vectors; FAISS asks for 39
_PROBED_SHARE = 0.05  # of the inverted lists


@runtime_checkable
class ArrayQueries(Protocol):
    """An embedder that takes many queries at once."""

    def embed_queries_array(self, texts: Sequence[str]) -> Vectors:
        """Vectors of the queries, (n, dimensions) float32."""


@dataclass(frozen=True)
class Candidate:
    """A passage found for a query."""

    passage: Passage
    position: int
    """in the pool"""
    rank: int
    """from 1"""
    score: float
    """cosine"""


class CandidateIndex:
    """Nearest passages by cosine; two bytes a dimension are kept of each vector, and an index over them."""

    def __init__(
        self,
        passages: Sequence[Passage],
        embeddings: Embeddings,
        *,
        exact_up_to: int,
        progress: Callable[[int, str], None] = lambda done, stage: None,
    ) -> None:
        self._passages = passages
        self._embeddings = embeddings
        self._vectors = self._embed(progress)
        self._index = _build(self._vectors, exact=len(passages) <= exact_up_to)

    def search(self, queries: Sequence[str], k: int) -> Iterator[tuple[Vectors, list[Candidate]]]:
        """(unit vector, k candidates) of each query in order: best first, ties by place in the pool."""
        for start in range(0, len(queries), _QUERIES_AT_ONCE):
            vectors = embed_queries(self._embeddings, queries[start : start + _QUERIES_AT_ONCE])
            _, positions = self._index.search(vectors, min(k, len(self._passages)))
            for vector, found in zip(vectors, positions, strict=True):
                yield vector, self._ranked(vector, found[found >= 0])

    def scores(self, vector: Vectors, positions: Sequence[int]) -> Vectors:
        """Cosines of a query's vector with passages of the pool, (n,)."""
        cosines: Vectors = self._vectors[np.asarray(positions)].astype(np.float32) @ vector
        return cosines

    def _ranked(self, vector: Vectors, positions: npt.NDArray[np.int64]) -> list[Candidate]:
        # the index may hold coarser vectors; rounded, so that equal passages tie whatever the order of summation
        scores = np.round(self.scores(vector, positions.tolist()), 6)
        order = np.lexsort((positions, -scores))
        return [
            Candidate(self._passages[position], int(position), rank, float(scores[place]))
            for rank, (place, position) in enumerate(zip(order, positions[order], strict=True), 1)
        ]

    def _embed(self, progress: Callable[[int, str], None]) -> npt.NDArray[np.float16]:
        vectors: npt.NDArray[np.float16] | None = None
        for start in range(0, len(self._passages), _PASSAGES_AT_ONCE):
            texts = [passage.text for passage in self._passages[start : start + _PASSAGES_AT_ONCE]]
            part = embed_documents(self._embeddings, texts)
            if vectors is None:
                vectors = np.empty((len(self._passages), part.shape[1]), np.float16)
            vectors[start : start + len(texts)] = part
            progress(start + len(texts), "embed")
        return np.zeros((0, 1), np.float16) if vectors is None else vectors


def embed_queries(embeddings: Embeddings, queries: Sequence[str]) -> Vectors:
    """Unit vectors of queries, (n, dimensions) float32."""
    if isinstance(embeddings, ArrayQueries):
        return unit_length(cast("ArrayQueries", embeddings).embed_queries_array(queries))
    return np.stack([embed_query(embeddings, query) for query in queries])


def _build(vectors: npt.NDArray[np.float16], *, exact: bool) -> Any:
    """A FAISS index over the vectors: all of them, or inverted lists where that would take too long."""
    import faiss

    count, dimensions = vectors.shape
    lists = max(1, math.isqrt(count))
    factory = "Flat" if exact else f"IVF{lists},SQ8"
    index: Any = faiss.index_factory(dimensions, factory, faiss.METRIC_INNER_PRODUCT)
    if not exact:
        stride = max(1, count // (lists * _TRAINING_PER_LIST))  # evenly over the pool, whose order may go by subject
        index.train(vectors[::stride].astype(np.float32))
        faiss.extract_index_ivf(index).nprobe = max(1, math.ceil(lists * _PROBED_SHARE))
    for start in range(0, count, _PASSAGES_AT_ONCE):
        index.add(vectors[start : start + _PASSAGES_AT_ONCE].astype(np.float32))
    return index
