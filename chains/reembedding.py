"""reembed: change the embedder. A second generation of vectors is made beside the first, which answers meanwhile."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from chains.embeddings import embed_documents, max_tokens, token_counter
from chains.ingestion import StoppedError
from chains.knowledge_base import Generation, KnowledgeBase, KnowledgeBaseError
from chains.knowledge_base_writer import MissingVectorsError
from chains.vectorstores import FaissVectorStore, identify, made_by

logger = logging.getLogger(__name__)

_BATCH_CHUNKS = 512  # embedded and committed together: what a kill loses at most


@dataclass(frozen=True)
class ReembedReport:
    """What became of it."""

    generation: int
    fingerprint: str
    embedded: int
    """chunks that got a vector in this run"""
    switched: bool
    """false where this embedder was answering already"""


def reembed(
    store: FaissVectorStore,
    *,
    rollback: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    stop: threading.Event | None = None,
) -> ReembedReport:
    """Give every chunk a vector by the store's embedder, then let these answer, in one transaction.

    Stopped or killed, it goes on where it was; the generation that answered before is kept for `rollback`, older ones
    are removed.

    Args:
        store: with the new embedder, not opened with `check_embedder`; with the one before, to roll back.
        rollback: go back to the kept generation; the store must have its embedder.
        progress: called with chunks that have a vector, and chunks in all.
        stop: set it to end after the batch in hand.

    Raises:
        KnowledgeBaseError: there is nothing to change or to go back to, or another run is at it.
        StoppedError: stopped.
    """
    kb = store.knowledge_base
    with _alone(kb):
        return _reembed(kb, store, rollback, progress, stop)


def discard(kb: KnowledgeBase) -> list[str]:
    """Drop the vectors of changes that were stopped before their end; fingerprints of the embedders that made them.

    What answers and what is kept to go back to stay.

    Raises:
        KnowledgeBaseError: a change is being made.
    """
    with _alone(kb):
        stay = {generation.id for generation in (kb.generation(), kb.previous_generation()) if generation is not None}
        dropped = [generation.fingerprint for generation in kb.generations() if generation.id not in stay]
        if dropped:
            _drop_others(kb, stay)
        return dropped


@contextlib.contextmanager
def _alone(kb: KnowledgeBase) -> Iterator[None]:
    """The right to change the generations; an error where another process has it."""
    lock = FileLock(kb.path / "reembed.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise KnowledgeBaseError(
            f"知识库 {kb.path} 正在由另一个进程重新生成向量，请等它结束",
            f"another process is re-embedding knowledge base {kb.path}; wait for it",
        ) from None
    try:
        yield
    finally:
        lock.release()


def _reembed(
    kb: KnowledgeBase,
    store: FaissVectorStore,
    rollback: bool,
    progress: Callable[[int, int], None],
    stop: threading.Event | None,
) -> ReembedReport:
    answering = kb.generation()
    if answering is None:
        raise KnowledgeBaseError(
            f"知识库 {kb.path} 还没有内容，请先 ragproj ingest",
            f"knowledge base {kb.path} is empty; run ragproj ingest",
        )
    if rollback:
        target = _kept(kb, store)
    elif made_by(answering, store.embeddings):
        return ReembedReport(answering.id, answering.fingerprint, 0, switched=False)
    else:
        target = _target(kb, store, answering)
    embedded = _fill_and_switch(kb, store, target, progress, stop)
    logger.info("generation %d (%s) answers now; %d is kept", target.id, target.fingerprint, answering.id)
    _drop_others(kb, {target.id, answering.id})
    return ReembedReport(target.id, target.fingerprint, embedded, switched=True)


def _kept(kb: KnowledgeBase, store: FaissVectorStore) -> Generation:
    """The generation to go back to, checked to be made by the store's embedder."""
    previous = kb.previous_generation()
    if previous is None:
        raise KnowledgeBaseError(
            f"知识库 {kb.path} 没有可以切换回去的旧向量",
            f"knowledge base {kb.path} keeps no older vectors to go back to",
        )
    if not made_by(previous, store.embeddings):
        raise KnowledgeBaseError(
            f"保留的旧向量由 {previous.fingerprint} 生成，请先把 embeddings 配置改回它",
            f"the kept vectors were made by {previous.fingerprint}; first set the embeddings config back to it",
        )
    return previous


def _target(kb: KnowledgeBase, store: FaissVectorStore, answering: Generation) -> Generation:
    """The generation to fill: one by this embedder that is there already, half made or kept, or a new one."""
    for generation in kb.generations():
        if generation.id != answering.id and made_by(generation, store.embeddings):
            return generation
    return kb.writer().add_generation(*identify(store.embeddings), store.embedder)


def _fill_and_switch(
    kb: KnowledgeBase,
    store: FaissVectorStore,
    generation: Generation,
    progress: Callable[[int, int], None],
    stop: threading.Event | None,
) -> int:
    """Make a generation complete and let it answer, however much is ingested meanwhile; chunks embedded."""
    embedded = 0
    while True:
        embedded += _fill(kb, store, generation, progress, stop)
        try:
            kb.writer().switch_generation(generation.id)
        except MissingVectorsError:
            continue  # of what came between the two
        return embedded


def _fill(
    kb: KnowledgeBase,
    store: FaissVectorStore,
    generation: Generation,
    progress: Callable[[int, int], None],
    stop: threading.Event | None,
) -> int:
    """Embed what has no vector yet, until there is nothing, also of what is ingested meanwhile; how many it were."""
    embedded = cut = 0
    while len(missing := kb.without_vector(generation.id)):
        total = kb.chunk_count()
        for start in range(0, len(missing), _BATCH_CHUNKS):
            if stop is not None and stop.is_set():
                raise StoppedError
            progress(max(0, total - len(missing) + start), total)
            texts: dict[int, Any] = dict(kb.index_texts(missing[start : start + _BATCH_CHUNKS]))
            vectors = embed_documents(store.embeddings, list(texts.values()))
            kb.writer().add_vectors(generation.id, np.array(list(texts), np.int64), vectors)
            embedded += len(texts)
            cut += _too_long(store, texts.values())
    if cut:
        logger.warning(
            "%d of %d chunks are longer than the %s tokens this embedder sees, their ends are in no vector; set a"
            " smaller splitter.chunk_size and ingest their files again",
            cut,
            embedded,
            max_tokens(store.embeddings),
        )
    progress(kb.chunk_count(), kb.chunk_count())
    return embedded


def _too_long(store: FaissVectorStore, texts: Iterable[str]) -> int:
    """How many of the texts have more tokens than the embedder sees; 0 for an embedder that does not say."""
    most, count = max_tokens(store.embeddings), token_counter(store.embeddings)
    return 0 if most is None else sum(len(text) > most and count(text) > most for text in texts)


def _drop_others(kb: KnowledgeBase, keep: set[int]) -> None:
    for generation in kb.generations():
        if generation.id not in keep:
            kb.writer().drop_generation(generation.id)
    kept_files = {f"faiss-{number}{suffix}" for number in keep for suffix in (".index", ".state")}
    for file in kb.path.glob("faiss-*"):
        if file.name not in kept_files:
            file.unlink(missing_ok=True)
