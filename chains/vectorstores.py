"""FaissVectorStore: LangChain's vector store over a knowledge base, searched with FAISS."""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Self, cast

import numpy as np
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import VectorStore
from langchain_core.vectorstores.utils import maximal_marginal_relevance
from pydantic import Field

from chains.caches import read_cache, write_cache
from chains.embeddings import PROBE, Vectors, embed_documents, embed_query, fingerprint
from chains.knowledge_base import (
    FingerprintError,
    Generation,
    Ids,
    KnowledgeBase,
    MetadataFilter,
    NewChunk,
    NewDocument,
    Writer,
)
from loaders.config import Config
from loaders.errors import RagProjError
from loaders.splitters import embedding_text

logger = logging.getLogger(__name__)

# Documents added from Python, without a "source" in their metadata, are listed under this name.
UNNAMED_SOURCE = "(python)"
# Rounding (another machine or batch, an int8 engine) moves the cosine by 1e-3 at most, another model by more.
_SAME_PROBE = 0.998


class FaissConfig(Config):
    """The FAISS index over the knowledge base's vectors."""

    type: Literal["faiss"] = Field(default="faiss", alias="_type")


class FaissIndex:
    """Exact inner-product search over one generation's vectors; a cache of the knowledge base."""

    def __init__(self, knowledge_base: KnowledgeBase, generation: Generation) -> None:
        self._kb = knowledge_base
        self._generation = generation
        self._path = knowledge_base.path / "faiss.index"
        self._lock = threading.Lock()
        self._revision, self._index = self._load()
        self._saved = self._revision

    def search(self, vector: Vectors, k: int, allowed: Ids | None = None) -> list[tuple[int, float]]:
        """(chunk id, cosine) of the k nearest chunks, nearest first, ties by id; only `allowed` ids where given."""
        import faiss

        with self._lock:
            self._refresh()
            k = min(k, self._index.ntotal)
            if k == 0 or (allowed is not None and not len(allowed)):
                return []
            parameters = None
            if allowed is not None:
                parameters = faiss.SearchParameters(sel=faiss.IDSelectorBatch(allowed))  # type: ignore[call-arg] # SWIG adds it
            scores, ids = self._index.search(vector.reshape(1, -1), k, params=parameters)
        found = [(int(i), float(score)) for i, score in zip(ids[0], scores[0], strict=True) if i >= 0]
        return sorted(found, key=lambda hit: (-hit[1], hit[0]))

    def save(self) -> None:
        """Write the cache file where it is behind."""
        import faiss

        with self._lock:
            self._refresh()
            if self._saved == self._revision:
                return
            header = {"revision": self._revision, "generation": self._generation.id}
            try:
                write_cache(self._path, header, faiss.serialize_index(self._index).tobytes())
            except OSError as error:  # the cache can always be made again
                logger.warning("cannot save %s (%s); it will be rebuilt when next opened", self._path.name, error)
                return
            self._saved = self._revision

    def _load(self) -> tuple[str, Any]:
        """(revision, index) from the cache file, or an empty index to be filled."""
        import faiss

        cached = read_cache(self._path)
        if cached is not None:
            header, payload = cached
            revision = str(header.get("revision"))
            if header.get("generation") == self._generation.id and self._kb.knows_revision(revision):
                return revision, faiss.deserialize_index(np.frombuffer(payload, np.uint8))
            logger.info("faiss.index belongs to another state of the knowledge base; rebuilding it")
        return "", faiss.IndexIDMap(faiss.IndexFlatIP(self._generation.dimensions))

    def _refresh(self) -> None:
        """Catch up with the knowledge base: drop ids that are gone, add new ones."""
        import faiss

        revision = self._kb.revision()
        if revision == self._revision:
            return
        active = self._kb.chunk_ids()
        held = faiss.vector_to_array(self._index.id_map)
        gone = np.setdiff1d(held, active)
        if len(gone):
            self._index.remove_ids(faiss.IDSelectorBatch(gone))
        for ids, vectors in self._kb.vectors(self._generation.id, np.setdiff1d(active, held)):
            self._index.add_with_ids(vectors, ids)
        self._revision = revision


class FaissVectorStore(VectorStore):
    """A LangChain vector store that keeps its documents in a knowledge base directory and survives restarts.

    `similarity_search` and the rest take `filter`: a mapping of metadata keys to a value or a list of allowed values,
    or a function of the metadata.
    """

    def __init__(self, embedding: Embeddings, knowledge_base: KnowledgeBase) -> None:
        self._embeddings = embedding
        self.knowledge_base = knowledge_base
        self._index: FaissIndex | None = None
        self._generation: Generation | None = None
        self._lock = threading.Lock()

    @property
    def embeddings(self) -> Embeddings:
        """The embedder of passages and queries."""
        return self._embeddings

    @classmethod
    def from_texts(
        cls,
        texts: list[str],
        embedding: Embeddings,
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        path: str | Path | None = None,
        **kwargs: Any,
    ) -> Self:
        """A store in the directory `path` (required) holding the texts."""
        if path is None:
            raise RagProjError(
                "FaissVectorStore.from_texts 需要 path=知识库目录", "FaissVectorStore.from_texts needs path=DIRECTORY"
            )
        store = cls(embedding, KnowledgeBase(path, create=True))
        store.add_texts(texts, metadatas, ids=ids, **kwargs)
        return store

    # -- documents -----------------------------------------------------------------------------------------------

    def add_texts(
        self,
        texts: Iterable[str],
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """Store each text as one chunk, replacing those whose id is already there; returns the ids."""
        texts = list(texts)
        metadatas = metadatas or [{} for _ in texts]
        ids = ids or [None] * len(texts)  # type: ignore[list-item]
        if not len(texts) == len(metadatas) == len(ids):
            raise ValueError(f"{len(texts)} texts, {len(metadatas)} metadatas and {len(ids)} ids do not match")
        documents = [
            Document(id=key or uuid.uuid4().hex, page_content=text, metadata=metadata)
            for key, text, metadata in zip(ids, texts, metadatas, strict=True)
        ]
        last = {cast("str", document.id): document for document in documents}  # an id given twice: the last one stands
        with self.knowledge_base.writing() as writer:
            self._store(writer, list(last.values()))
        return [cast("str", document.id) for document in documents]

    def _store(self, writer: Writer, documents: list[Document]) -> None:
        if not documents:
            return
        generation = self.ensure_generation(writer)
        vectors = embed_documents(self._embeddings, [embedding_text(document) for document in documents])
        by_source: dict[str, list[int]] = {}
        for row, document in enumerate(documents):
            by_source.setdefault(str(document.metadata.get("source", UNNAMED_SOURCE)), []).append(row)
        entries = {source: [_entry(documents[row]) for row in rows] for source, rows in by_source.items()}
        order = [row for rows in by_source.values() for row in rows]
        writer.replace_chunks(entries, generation.id, vectors[order])

    def delete(self, ids: list[str] | None = None, **kwargs: Any) -> bool | None:
        """Remove chunks by id, all of them for None; unknown ids are no error."""
        with self.knowledge_base.writing() as writer:
            if ids is None:
                writer.remove_sources(self.knowledge_base.source_names())
            else:
                writer.remove_chunks(ids)
        return True

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """The documents with these ids, in that order; unknown ones are left out."""
        found = self.knowledge_base.chunks_by_key(list(ids))
        return [found[key].document() for key in ids if key in found]

    # -- search --------------------------------------------------------------------------------------------------

    def search_ids(
        self,
        vector: Vectors,
        k: int,
        filter: MetadataFilter | None = None,  # noqa: A002 LangChain's word
    ) -> list[tuple[int, float]]:
        """(chunk id, cosine) of the k nearest chunks, nearest first."""
        index = self._open_index()
        if index is None:
            return []
        allowed = None if filter is None else self.knowledge_base.matching_ids(filter)
        return index.search(vector, k, allowed)

    def similarity_search(self, query: str, k: int = 4, **kwargs: Any) -> list[Document]:
        """The k documents nearest to the query."""
        return [document for document, _ in self.similarity_search_with_score(query, k, **kwargs)]

    def similarity_search_with_score(
        self,
        query: str,
        k: int = 4,
        filter: MetadataFilter | None = None,  # noqa: A002
        **kwargs: Any,
    ) -> list[tuple[Document, float]]:
        """(document, cosine) of the k nearest, nearest first."""
        return self._documents(self.search_ids(self.embed_query(query), k, filter))

    def similarity_search_by_vector(
        self,
        embedding: list[float],
        k: int = 4,
        filter: MetadataFilter | None = None,  # noqa: A002
        **kwargs: Any,
    ) -> list[Document]:
        """The k documents nearest to a vector, of any length."""
        return [document for document, _ in self._documents(self.search_ids(_unit(embedding), k, filter))]

    def max_marginal_relevance_search(
        self, query: str, k: int = 4, fetch_k: int = 20, lambda_mult: float = 0.5, **kwargs: Any
    ) -> list[Document]:
        """k of the `fetch_k` nearest documents, chosen to be near the query and unlike each other."""
        vector = self.embed_query(query).tolist()
        return self.max_marginal_relevance_search_by_vector(vector, k, fetch_k, lambda_mult, **kwargs)

    def max_marginal_relevance_search_by_vector(
        self,
        embedding: list[float],
        k: int = 4,
        fetch_k: int = 20,
        lambda_mult: float = 0.5,
        filter: MetadataFilter | None = None,  # noqa: A002
        **kwargs: Any,
    ) -> list[Document]:
        """As `max_marginal_relevance_search`, for a vector."""
        query = _unit(embedding)
        hits = self.search_ids(query, fetch_k, filter)
        if not hits:
            return []
        ids = np.array([chunk for chunk, _ in hits], np.int64)
        generation = cast("Generation", self._generation)
        vectors = {
            int(i): vector
            for batch, rows in self.knowledge_base.vectors(generation.id, ids)
            for i, vector in zip(batch, rows, strict=True)
        }
        chosen = maximal_marginal_relevance(query, [vectors[int(i)] for i in ids], lambda_mult=lambda_mult, k=k)
        return [document for document, _ in self._documents([hits[i] for i in chosen])]

    def embed_query(self, query: str) -> Vectors:
        """Unit vector of a query, (dimensions,)."""
        return embed_query(self._embeddings, query)

    def save_cache(self) -> None:
        """Bring the FAISS file up to date, so that the next start does not have to."""
        index = self._open_index()
        if index is not None:
            index.save()

    def _documents(self, hits: list[tuple[int, float]]) -> list[tuple[Document, float]]:
        chunks = self.knowledge_base.chunks(i for i, _ in hits)
        return [(chunks[i].document(), score) for i, score in hits if i in chunks]

    def _select_relevance_score_fn(self) -> Callable[[float], float]:
        return lambda cosine: min(1.0, max(0.0, cosine))

    # -- the embedder --------------------------------------------------------------------------------------------

    def ensure_generation(self, writer: Writer) -> Generation:
        """The generation to write into, checked against the embedder; the first write makes it."""
        generation = self.check_embedder()
        if generation is None:
            name = fingerprint(self._embeddings)
            generation = writer.add_generation(name, embed_documents(self._embeddings, [PROBE])[0])
            logger.info("knowledge base %s: vectors by %s", self.knowledge_base.path, name)
        return generation

    def check_embedder(self) -> Generation | None:
        """The generation that answers, None before the first write.

        Raises:
            FingerprintError: another embedder made its vectors.
        """
        with self._lock:
            if self._generation is None:
                generation = self.knowledge_base.generation()
                if generation is not None:
                    _require_same_embedder(generation, self._embeddings, self.knowledge_base.path)
                    self._generation = generation
            return self._generation

    def _open_index(self) -> FaissIndex | None:
        generation = self.check_embedder()
        with self._lock:
            if self._index is None and generation is not None:
                self._index = FaissIndex(self.knowledge_base, generation)
            return self._index


def _require_same_embedder(generation: Generation, embeddings: Embeddings, path: Path) -> None:
    name = fingerprint(embeddings)
    if name == generation.fingerprint:
        probe = embed_documents(embeddings, [PROBE])[0]
        if probe.shape == generation.probe.shape and float(probe @ generation.probe) >= _SAME_PROBE:
            return
        name += f"（{len(probe)} 维，权重不同）"
    raise FingerprintError(
        f"知识库 {path} 的向量由 {generation.fingerprint} 生成，当前配置的是 {name}，两者不能混用；"
        "请改回原来的 embeddings 配置，或用 --kb 指定新目录重新 ingest",
        f"the vectors of knowledge base {path} were made by {generation.fingerprint}, the configured embedder is"
        f" {name}; restore the embeddings config, or ingest again into a new --kb directory",
    )


def _entry(document: Document) -> NewDocument:
    """A Python caller's document with its one chunk."""
    text = document.page_content
    chunk = NewChunk(cast("str", document.id), 0, len(text), text, document.metadata)
    return NewDocument(str(document.metadata.get("title", "")), text, [chunk])


def _unit(embedding: Sequence[float]) -> Vectors:
    vector = np.asarray(embedding, np.float32)
    length = float(np.linalg.norm(vector))
    return vector / length if length else vector
