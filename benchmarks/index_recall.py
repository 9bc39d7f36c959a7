"""Recall and speed of every kind of FAISS index against exact search.

    python -m benchmarks.index_recall                       # 118k and 1M lexical vectors, 118k clustered ones
    python -m benchmarks.index_recall --sizes 20000 --work DIR --kinds flat pq

Lexical vectors are those of real passages and of mixtures of their sentences, with questions people asked; clustered
ones are random, 768 dimensions, shaped like a semantic embedder's. Searches go through `FaissIndex`, 100 asked as the
hybrid retriever does; recall@10 is the share of the first ten at least as near as the exact tenth. `auto` is the kind
that the default config chooses. `hnsw` is left out at 1M (its graph takes over half an hour on 2 cores) unless named.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import faiss
import numpy as np
import numpy.typing as npt

from benchmarks.machine import RESULTS, Report
from benchmarks.material import clustered_vectors, lexical_vectors, questions
from benchmarks.measuring import latency, seconds
from chains.embeddings import Vectors
from chains.faiss_index import FaissConfig, FaissIndex
from chains.knowledge_base import Generation, Ids, KnowledgeBase
from chains.lexical_embeddings import LexicalEmbeddings

KINDS = ("flat", "sq8", "hnsw", "pq")
SIZES = (118_000, 1_000_000)
CLUSTERED, CLUSTERED_DIMENSIONS = 118_000, 768
HNSW_UP_TO = 200_000
FETCH, TOP = 100, 10
RECALL_BAR = 0.98
_BLOCK = 20_000
_ROUNDING = 1e-5  # two ways to sum 1,024 products


class VectorsOnly:
    """As much of a knowledge base as a FAISS index asks for: vectors with the ids 0, 1, 2, ..."""

    def __init__(self, path: Path, vectors: npt.NDArray[np.float16]) -> None:
        self.path = path
        self._vectors = vectors

    def revision(self) -> str:
        """It never changes."""
        return "1"

    def knows_revision(self, _: str) -> bool:
        """Nothing is saved."""
        return False

    def snapshot(self) -> tuple[str, Ids]:
        """All."""
        return "1", np.arange(len(self._vectors))

    def vectors(self, _: int, ids: Ids) -> Iterator[tuple[Ids, Vectors]]:
        """In batches, as from the database."""
        ordered = np.sort(ids)
        for start in range(0, len(ordered), _BLOCK):
            part = ordered[start : start + _BLOCK]
            yield part, np.asarray(self._vectors[part], np.float32)


def exact_tenth(vectors: npt.NDArray[np.float16], queries: Vectors) -> Vectors:
    """Inner product of each query's tenth nearest vector, (queries,), by brute force in single precision."""
    best = np.full((len(queries), TOP), -np.inf, np.float32)
    for start in range(0, len(vectors), _BLOCK):
        scores = queries @ np.asarray(vectors[start : start + _BLOCK], np.float32).T
        top = np.partition(scores, -TOP, axis=1)[:, -TOP:]
        best = np.partition(np.concatenate([best, top], axis=1), -TOP, axis=1)[:, -TOP:]
    tenth: Vectors = best.min(axis=1)
    return tenth


def recall(
    index: FaissIndex, vectors: npt.NDArray[np.float16], queries: Vectors, tenth: npt.NDArray[np.float32]
) -> float:
    """Mean share of the first ten found that are at least as near as the exact tenth; equals may stand in."""
    shares = []
    for query, limit in zip(queries, tenth, strict=True):
        found = [number for number, _ in index.search(query, FETCH)[:TOP]]
        true = np.asarray(vectors[found], np.float32) @ query
        shares.append(float((true >= limit - _ROUNDING).mean()))
    return float(np.mean(shares))


def measure(
    report: Report, what: str, vectors: npt.NDArray[np.float16], queries: Vectors, kinds: list[str], work: Path
) -> None:
    """Every kind in turn over the same vectors."""
    count, dimensions = vectors.shape
    tenth = exact_tenth(vectors, queries)
    generation = Generation(1, "benchmark", dimensions, vectors[0].astype(np.float32))
    store = cast("KnowledgeBase", VectorsOnly(work, vectors))
    automatic = FaissIndex(store, generation)._choose_kind(count)
    for kind in kinds:
        index = FaissIndex(store, generation, FaissConfig.model_validate({"index": kind}))
        build = seconds(lambda index=index: index.search(queries[0], FETCH))  # type: ignore[misc]
        took = latency(lambda query, index=index: index.search(query, FETCH), list(queries))  # type: ignore[misc]
        share = recall(index, vectors, queries, tenth)
        row: dict[str, Any] = {"recall_at_10": share, "p50_ms": took.p50, "p95_ms": took.p95, "build_s": build}
        chosen = kind == automatic
        report.add(what, kind=kind, auto=chosen, **row, bytes_a_vector=_size(index, work) / count)
        if chosen:
            report.bar(f"recall@10 of {kind}, chosen for {what}", share, RECALL_BAR, "", at_least=True)


def _size(index: FaissIndex, work: Path) -> int:
    path = work / "size.index"
    faiss.write_index(index._index, str(path))
    size = path.stat().st_size
    path.unlink()
    return size


def main() -> None:
    """Measure lexical vectors at every size, then clustered ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES, help="lexical vectors")
    parser.add_argument("--clustered", type=int, default=CLUSTERED, help="clustered vectors; 0: skip")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, help="default: all, hnsw only where it builds in minutes")
    parser.add_argument("--work", type=Path, help="keeps the vectors for another run")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        shown = {"sizes": options.sizes, "clustered": options.clustered, "kinds": options.kinds or "default"}
        with Report("index_recall", shown, options.results) as report:
            asked = LexicalEmbeddings().embed_documents_array(questions())
            for count in options.sizes:
                kinds = options.kinds or [kind for kind in KINDS if kind != "hnsw" or count <= HNSW_UP_TO]
                measure(report, f"{count} lexical vectors", lexical_vectors(work, count), asked, kinds, work)
            if options.clustered:
                vectors, near = clustered_vectors(options.clustered, CLUSTERED_DIMENSIONS, len(asked))
                what = f"{options.clustered} clustered vectors of {CLUSTERED_DIMENSIONS} dimensions"
                measure(report, what, vectors, near, options.kinds or list(KINDS), work)


if __name__ == "__main__":
    main()
