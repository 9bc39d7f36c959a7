"""check: SQLite, FAISS and the full-text index agree, and every offset is right."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from chains.faiss_index import FaissIndex
from chains.fulltext import FullTextIndex
from chains.knowledge_base import Generation, Ids, KnowledgeBase
from chains.knowledge_base_integrity import integrity_problems, wrong_offsets
from chains.vectorstores import FaissVectorStore

_SAMPLE = 200  # chunks searched for by their own vector and their own words
_SHOWN = 10  # ids named in a problem


@dataclass(frozen=True)
class CheckReport:
    """What was found; `problems` is empty when all is well."""

    ok: bool
    problems: list[str]
    unfinished: list[str]
    """sources that are being written, or whose run was interrupted; the next ingest goes on with them"""
    sources: int
    chunks: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """The report as `check --json` prints it."""
        return asdict(self)


def check(store: FaissVectorStore, fulltext: FullTextIndex) -> CheckReport:
    """Everything that must hold between the database and its caches; the embedder is not asked.

    Raises:
        KnowledgeBaseError: the database is damaged.
    """
    started = time.monotonic()
    kb = store.knowledge_base
    generation, index = kb.generation(), store.answering_index()
    problems = [*integrity_problems(kb), *_offset_problems(kb)]
    active = kb.chunk_ids()
    if generation is not None:
        problems += _vector_problems(kb, generation, active)
    problems += _id_problems("FAISS", active[:0] if index is None else index.ids(), active)
    problems += _id_problems("tantivy", fulltext.ids(), active)
    if not problems and generation is not None and index is not None and len(active):
        sample = np.random.default_rng(0).choice(active, min(_SAMPLE, len(active)), replace=False)
        problems += _search_problems(kb, generation, index, fulltext, sample)
    return CheckReport(
        ok=not problems,
        problems=problems,
        unfinished=kb.staged_sources(),
        sources=len(kb.source_names()),
        chunks=len(active),
        seconds=round(time.monotonic() - started, 3),
    )


def _offset_problems(kb: KnowledgeBase) -> Iterator[str]:
    wrong = wrong_offsets(kb)
    if wrong:
        yield f"{len(wrong)} 个片段与原文不符 / chunks are not their document's text at their offsets: {wrong[:_SHOWN]}"


def _vector_problems(kb: KnowledgeBase, generation: Generation, active: Ids) -> Iterator[str]:
    missing = np.intersect1d(kb.without_vector(generation.id), active)
    if len(missing):
        yield f"{len(missing)} 个片段没有向量 / chunks have no vector: {missing[:_SHOWN].tolist()}"
    for ids, vectors in kb.vectors(generation.id, active):
        if vectors.shape[1] != generation.dimensions or not np.isfinite(vectors).all():
            yield f"{ids[0]} 附近的向量损坏 / vectors near {ids[0]} are not {generation.dimensions} numbers"


def _id_problems(name: str, held: Ids, active: Ids) -> Iterator[str]:
    for text, ids in (
        (f"{name} 缺少片段 / lacks chunks", np.setdiff1d(active, held)),
        (f"{name} 多出已移除的片段 / holds removed chunks", np.setdiff1d(held, active)),
    ):
        if len(ids):
            yield f"{text}: {len(ids)}, {ids[:_SHOWN].tolist()}"
    if len(held) != len(np.unique(held)):
        yield f"{name} 有重复的片段 / holds chunks twice: {len(held) - len(np.unique(held))}"


def _search_problems(
    kb: KnowledgeBase, generation: Generation, index: FaissIndex, fulltext: FullTextIndex, sample: Ids
) -> Iterator[str]:
    """Whether a sample of chunks is found by its own vector and its own words."""
    for ids, vectors in kb.vectors(generation.id, sample):
        for chunk_id, vector in zip(ids, vectors, strict=True):
            if np.any(vector) and not _finds(index.search(vector, 1), float(vector @ vector)):
                yield f"FAISS 按自身向量找不到片段 / does not find a chunk by its own vector: {chunk_id}"
    for chunk_id, text in kb.index_texts(sample):
        found = fulltext.search(text, 1, allowed=np.array([chunk_id]))
        if not found and fulltext.has_terms(text):
            yield f"tantivy 按自身文字找不到片段 / does not find a chunk by its own words: {chunk_id}"


def _finds(hits: list[tuple[int, float]], score: float) -> bool:
    # any hit as near as itself: equal texts have equal vectors; one part in a hundred for 8-bit indexes
    return bool(hits) and hits[0][1] >= 0.99 * score
