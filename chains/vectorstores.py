"""FaissVectorStore: LangChain's vector store over a knowledge base, searched with FAISS."""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import VectorStore
from langchain_core.vectorstores.utils import maximal_marginal_relevance

from chains.embeddings import PROBE, Vectors, embed_documents, embed_query, fingerprint
from chains.faiss_index import FaissConfig, FaissIndex
from chains.knowledge_base import FingerprintError, Generation, KnowledgeBase
from chains.knowledge_base_filters import MetadataFilter
from chains.knowledge_base_writer import NewChunk, NewDocument, content_hash
from loaders.errors import RagProjError
from loaders.splitters import embedding_text

logger = logging.getLogger(__name__)

# Documents added from Python, without a "source" in their metadata, are listed under this name.
UNNAMED_SOURCE = "(python)"
# Rounding (another machine or batch, an int8 engine) moves the cosine by 1e-3 at most, another model by more.
_SAME_PROBE = 0.998


class FaissVectorStore(VectorStore):
    """A LangChain vector store that keeps its documents in a knowledge base directory and survives restarts.

    `similarity_search` and the rest take `filter`: a mapping of metadata keys to a value or a list of allowed values,
    or a function of the metadata.
    """

    def __init__(
        self,
        embedding: Embeddings,
        knowledge_base: KnowledgeBase,
        *,
        config: FaissConfig | None = None,
        embedder: Mapping[str, Any] | None = None,
    ) -> None:
        """A store over a knowledge base.

        Args:
            embedding: embedder of passages and queries.
            knowledge_base: where documents and vectors are.
            config: of the FAISS index.
            embedder: the config section `embedding` was made from, kept with its vectors.
        """
        self._embeddings = embedding
        self.embedder = embedder
        self._config = config
        self.knowledge_base = knowledge_base
        self._index: FaissIndex | None = None
        self._generation: Generation | None = None
        self._seen = ""  # the revision at which the generation was last known to be kept
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
        self._store(list(last.values()))
        return [cast("str", document.id) for document in documents]

    def _store(self, documents: list[Document]) -> None:
        if not documents:
            return
        generation = self.ensure_generation()
        entries: dict[str, list[NewDocument]] = {}
        rows: dict[str, list[int]] = {}
        for row, document in enumerate(documents):
            source = str(document.metadata.get("source", UNNAMED_SOURCE))
            entries.setdefault(source, []).append(_entry(document))
            rows.setdefault(source, []).append(row)
        vectors = embed_documents(self._embeddings, [embedding_text(document) for document in documents])
        order = [row for group in rows.values() for row in group]
        self.knowledge_base.writer().replace_chunks(entries, generation.id, vectors[order])

    def delete(self, ids: list[str] | None = None, **kwargs: Any) -> bool | None:
        """Remove chunks by id, all of them for None; unknown ones are no error."""
        writer = self.knowledge_base.writer()
        if ids is None:
            writer.remove_everything()
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
        self._require_kept()
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
        return self._documents(self.search_ids(self.embed_query(query), k, filter), filter)

    def similarity_search_by_vector(
        self,
        embedding: list[float],
        k: int = 4,
        filter: MetadataFilter | None = None,  # noqa: A002
        **kwargs: Any,
    ) -> list[Document]:
        """The k documents nearest to a vector, of any length."""
        return [document for document, _ in self._documents(self.search_ids(_unit(embedding), k, filter), filter)]

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
        return [document for document, _ in self._documents([hits[i] for i in chosen], filter)]

    def embed_query(self, query: str) -> Vectors:
        """Unit vector of a query, (dimensions,)."""
        return embed_query(self._embeddings, query)

    def answering_index(self) -> FaissIndex | None:
        """The index over the vectors that answer, to be looked after, whoever made them; None before there are any."""
        generation = self.knowledge_base.generation()
        if generation is None:
            return None
        with self._lock:
            if self._generation is None or self._generation.id != generation.id:
                return FaissIndex(self.knowledge_base, generation, self._config)
            if self._index is None:
                self._index = FaissIndex(self.knowledge_base, generation, self._config)
            return self._index

    def save_cache(self) -> None:
        """Bring the FAISS file up to date, so that the next start does not have to."""
        index = self.answering_index()
        if index is not None:
            index.save()

    def compact_cache(self) -> None:
        """Take removed vectors out of the FAISS file for good; may take a second, so call it when nobody waits."""
        index = self.answering_index()
        if index is not None:
            index.compact()

    def _documents(
        self,
        hits: list[tuple[int, float]],
        filter: MetadataFilter | None,  # noqa: A002
    ) -> list[tuple[Document, float]]:
        chunks = self.knowledge_base.chunks((i for i, _ in hits), filter)  # under a document that the filter allows
        return [(chunks[i].document(), score) for i, score in hits if i in chunks]

    def _select_relevance_score_fn(self) -> Callable[[float], float]:
        return lambda cosine: min(1.0, max(0.0, cosine))

    # -- the embedder --------------------------------------------------------------------------------------------

    def ensure_generation(self) -> Generation:
        """The generation to write into, checked against the embedder; the first write makes it."""
        answering, generation = self.knowledge_base.generation(), self.check_embedder()
        if generation is not None and answering is not None and answering.id != generation.id:
            # switched by somebody else: questions are still answered from the kept vectors, nothing is written to them
            _require_same_embedder(answering, self._embeddings, self.knowledge_base.path)
            with self._lock:
                self._generation, self._index = answering, None
                return answering
        if generation is not None and generation.embedder is None and self.embedder is not None:
            self.knowledge_base.writer().remember_embedder(generation.id, self.embedder)
        if generation is None:
            name, probe = identify(self._embeddings)
            self.knowledge_base.writer().first_generation(name, probe, self.embedder)
            logger.info("knowledge base %s: vectors by %s", self.knowledge_base.path, name)
            generation = self.check_embedder()
            assert generation is not None
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

    def _require_kept(self) -> None:
        """Raise where the generation this store answers from was dropped: two changes of the embedder while it ran."""
        revision = self.knowledge_base.revision()
        if revision != self._seen:
            generation, answering = self._generation, self.knowledge_base.generation()
            if generation is not None and answering is not None and answering.id != generation.id:
                if all(kept.id != generation.id for kept in self.knowledge_base.generations()):
                    _require_same_embedder(answering, self._embeddings, self.knowledge_base.path)
                logger.warning(
                    "another embedder answers by now; this store goes on with the kept vectors, without newer documents"
                )
            self._seen = revision

    def _open_index(self) -> FaissIndex | None:
        generation = self.check_embedder()
        with self._lock:
            if self._index is None and generation is not None:
                self._index = FaissIndex(self.knowledge_base, generation, self._config)
            return self._index


def identify(embeddings: Embeddings) -> tuple[str, Vectors]:
    """(fingerprint, vector of the probe text): what a generation is recognised by."""
    return fingerprint(embeddings), embed_documents(embeddings, [PROBE])[0]


def made_by(generation: Generation, embeddings: Embeddings) -> bool:
    """Whether an embedder is the one that made a generation's vectors."""
    name, probe = identify(embeddings)
    if name != generation.fingerprint or probe.shape != generation.probe.shape:
        return False
    return float(probe @ generation.probe) >= _SAME_PROBE


def _require_same_embedder(generation: Generation, embeddings: Embeddings, path: Path) -> None:
    if made_by(generation, embeddings):
        return
    name, probe = identify(embeddings)
    if name == generation.fingerprint:
        name += f"（{len(probe)} 维，权重不同）"
    raise FingerprintError(
        f"知识库 {path} 的向量由 {generation.fingerprint} 生成，当前配置的是 {name}，两者不能混用；"
        "请改回原来的 embeddings 配置，或运行 ragproj reembed 换用新模型",
        f"the vectors of knowledge base {path} were made by {generation.fingerprint}, the configured embedder is"
        f" {name}; restore the embeddings config, or run ragproj reembed to change over to the new one",
    )


def _entry(document: Document) -> NewDocument:
    """A Python caller's document with its one chunk; its id keeps it apart from others with the same text."""
    key, text = cast("str", document.id), document.page_content
    title = document.metadata.get("title")
    chunk = NewChunk(key, 0, len(text), text, document.metadata)
    return NewDocument(content_hash("id", key), title if isinstance(title, str) else "", text, {}, [chunk])


def _unit(embedding: Sequence[float]) -> Vectors:
    vector = np.asarray(embedding, np.float32)
    length = float(np.linalg.norm(vector))
    return vector / length if length else vector
