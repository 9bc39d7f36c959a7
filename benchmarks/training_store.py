"""A knowledge base over passages whose vectors are known: for retrieval measured without embedding twice."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from langchain_core.embeddings import Embeddings

from chains.embeddings import Vectors
from chains.fulltext import FullTextIndex
from chains.knowledge_base import KnowledgeBase
from chains.vectorstores import FaissVectorStore
from finetune.evaluation import Passage


class KnownVectors(Embeddings):
    """Vectors made before, under the texts they belong to."""

    fingerprint = "known"

    def __init__(self, texts: Sequence[str], vectors: Vectors) -> None:
        self._vectors = dict(zip(texts, vectors, strict=True))

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Looked up; any vector for the probe by which a store recognises its embedder."""
        return [self.embed_query(text) for text in texts]

    def embed_query(self, text: str) -> list[float]:
        """Looked up, likewise."""
        found: list[float] = self._vectors.get(text, next(iter(self._vectors.values()))).tolist()
        return found


@contextlib.contextmanager
def open_store(passages: Sequence[Passage], vectors: Vectors) -> Iterator[tuple[FaissVectorStore, FullTextIndex]]:
    """A vector store and a full-text index over the passages, one chunk each; removed afterwards."""
    known = KnownVectors([passage.embedded for passage in passages], vectors)
    with tempfile.TemporaryDirectory() as folder, KnowledgeBase(Path(folder) / "kb", create=True) as knowledge_base:
        store = FaissVectorStore(known, knowledge_base)
        store.add_documents([passage.document for passage in passages], ids=[passage.id for passage in passages])
        yield store, FullTextIndex(knowledge_base)
