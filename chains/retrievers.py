"""Retrievers over a knowledge base: nearest vectors, BM25, and both fused; then what is asked of the hits."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.vectorstores import VectorStore
from pydantic import ConfigDict, Field, model_validator

from chains.calibration import Background, mention_relevance
from chains.embeddings import Vectors
from chains.extraction import coverage
from chains.fulltext import FullTextIndex
from chains.fusion import Ranking, above_last, diversify, fuse_ranks, fuse_scores, in_order, with_support
from chains.knowledge_base import Ids, KnowledgeBase, StoredChunk
from chains.knowledge_base_filters import MetadataFilter
from chains.lexical_embeddings import LexicalEmbeddings
from chains.passages import join_neighbours
from chains.rescoring import closeness
from chains.vectorstores import FaissVectorStore
from loaders.splitters import text_with_context

# Of the dense leg. Vectors of the lexical embedder count the words that BM25 counts, only less exactly: recall falls
# from .2 on. One that knows meanings is worth as much as BM25.
_LEXICAL_WEIGHT, _SEMANTIC_WEIGHT = 0.1, 0.5
_FIRST = 3  # lexical hits that tell what the lexical leg is worth
_SUPPORTED = 60  # of the fused chunks: what stands further down neither comes up nor lifts others
_DEPTH = 4  # times `top_k` chunks to choose from, where the best ones may not all be taken
# With a cap per source: so many chunks are looked at first, then so many times more, up to so many.
_FIRST_LOOK, _WIDER, _DEEPEST = 100, 6, 3600
_FOUND_PLACE = ("document_id", "start", "end")  # what tells a hit when a compressor made a new document of it


class Reader:
    """Chunks of a knowledge base, each read once for one question, or twice where two threads ask for it at once."""

    def __init__(self, knowledge_base: KnowledgeBase) -> None:
        self._kb = knowledge_base
        self._read: dict[int, StoredChunk] = {}

    def chunks(self, ids: Iterable[int], condition: MetadataFilter | None = None) -> dict[int, StoredChunk]:
        """As `KnowledgeBase.chunks`; those that are gone are left out."""
        if condition is not None:  # which of the documents that hold a chunk is shown depends on it
            return self._kb.chunks(ids, condition)
        wanted = list(ids)
        self._read |= self._kb.chunks(i for i in wanted if i not in self._read)
        return {i: self._read[i] for i in wanted if i in self._read}


class ChunkRetriever(BaseRetriever):
    """Common part: ranks chunk ids, chooses among them, then reads the chunks and tells how relevant each is.

    A document's metadata is the chunk's own, with `source`, `document_id`, `start`, `end` (offsets into the source
    document's normalised text) and `score`, the calibrated relevance in [0, 1], laid over it.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    store: FaissVectorStore
    top_k: int = Field(default=5, ge=1)
    filter: dict[str, Any] | None = None
    mmr_lambda: float | None = Field(default=None, ge=0, le=1)
    per_source: int | None = Field(default=None, ge=1)
    neighbours: int = Field(default=0, ge=0)
    reranker: BaseDocumentCompressor | None = None
    rerank_fetch: int = Field(default=20, ge=1)
    background: Background | None = Field(default=None, exclude=True, repr=False)

    @model_validator(mode="after")
    def _share_background(self) -> ChunkRetriever:
        """One sample for this retriever and its copies, which LangChain makes for every `top_k` of a run."""
        if self.background is None:
            self.background = Background(self.store)
        return self

    def rank(self, query: str, k: int, *, vector: Vectors | None = None, read: Reader | None = None) -> Ranking:
        """(chunk id, score) of the k best chunks, best first; scores compare within one ranking only.

        Args:
            query: the question.
            k: chunks, at most.
            vector: of the question, where it is known already.
            read: chunks are read through it, so that those read for this question are not read again.
        """
        raise NotImplementedError

    def _query_vector(self, query: str) -> Vectors | None:
        return self.store.embed_query(query)

    def _allowed(self) -> Ids | None:
        return None if self.filter is None else self.store.knowledge_base.matching_ids(self.filter)

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        vector = self._query_vector(query)
        hits = self._hits(query, vector, self.top_k if self.reranker is None else max(self.top_k, self.rerank_fetch))
        documents = self._with_relevance(query, vector, hits)
        if self.reranker is not None:
            reranked = self.reranker.compress_documents(documents, query, callbacks=run_manager.get_child())
            documents = located(list(reranked)[: self.top_k], documents)
        if self.neighbours:
            return self._joined(documents, hits)
        return documents

    def _hits(self, query: str, vector: Vectors | None, wanted: int) -> list[StoredChunk]:
        """The chunks wanted, best first; fewer where the ranking ends, or the cap per source leaves no more."""
        read = Reader(self.store.knowledge_base)
        depth = wanted if self.mmr_lambda is None and self.per_source is None else wanted * _DEPTH
        if self.per_source is not None:
            depth = max(_FIRST_LOOK, depth)
        while True:
            ranking = self.rank(query, depth, vector=vector, read=read)
            chunks = read.chunks((i for i, _ in ranking), self.filter)
            chosen = self._chosen([hit for hit in ranking if hit[0] in chunks], chunks, wanted)
            ended = len(ranking) < depth or depth >= _DEEPEST
            if self.per_source is None or len(chosen) >= wanted or ended:
                return [chunks[i] for i, _ in chosen]
            depth = min(depth * _WIDER, _DEEPEST)

    def _chosen(self, ranking: Ranking, chunks: Mapping[int, StoredChunk], k: int) -> Ranking:
        """The k best that the cap per source and the wish for variety leave."""
        if self.per_source is not None:
            seen: Counter[str] = Counter()
            kept = []
            for chunk, score in ranking:
                seen[chunks[chunk].source] += 1
                if seen[chunks[chunk].source] <= self.per_source:
                    kept.append((chunk, score))
            ranking = kept
        if self.mmr_lambda is not None:
            ranking = ranking[: k * _DEPTH]
            return diversify(ranking, self._vectors(chunk for chunk, _ in ranking), self.mmr_lambda, k)
        return ranking[:k]

    def _vectors(self, ids: Iterable[int]) -> dict[int, Vectors]:
        generation = self.store.check_embedder()
        if generation is None:
            return {}
        wanted = np.fromiter(ids, np.int64)
        found = self.store.knowledge_base.vectors(generation.id, wanted)
        return {int(i): vector for batch, rows in found for i, vector in zip(batch, rows, strict=True)}

    def _with_relevance(self, query: str, vector: Vectors | None, hits: Sequence[StoredChunk]) -> list[Document]:
        near: dict[int, float] = {}
        if vector is not None and self.background is not None and not _is_lexical(self.store):
            near = self.background.relevances(vector, self._vectors(hit.id for hit in hits))
        documents = []
        for hit in hits:
            score = max(mention_relevance(query, hit.document()), near.get(hit.id, 0.0))
            documents.append(_with_place(hit, score))
        return documents

    def _joined(self, documents: Sequence[Document], hits: Sequence[StoredChunk]) -> list[Document]:
        """The documents grown to passages. What a reranker made up itself is left as it is."""
        by_key = {hit.key: hit for hit in hits}
        keys = dict.fromkeys(document.id for document in documents if document.id in by_key)  # a hit may come in pieces
        chosen = [by_key[key] for key in keys if key is not None]
        scores = {document.id: document.metadata.get("score", 0.0) for document in documents}
        passages = []
        for passage in join_neighbours(chosen, self.store.knowledge_base, self.neighbours):
            best = max(scores.get(part.key, 0.0) for part in passage.parts)
            document = _with_place(passage.hit, best)
            place = {"start": passage.start, "end": passage.end, **passage.places()[0], "parts": passage.places()}
            passages.append(
                Document(id=document.id, page_content=passage.text, metadata={**document.metadata, **place})
            )
        return passages + [document for document in documents if document.id not in by_key]


class DenseRetriever(ChunkRetriever):
    """Nearest vectors."""

    def rank(self, query: str, k: int, *, vector: Vectors | None = None, read: Reader | None = None) -> Ranking:
        """By cosine."""
        return self.store.search_ids(self.store.embed_query(query) if vector is None else vector, k, self.filter)


class LexicalRetriever(ChunkRetriever):
    """BM25 over Chinese terms."""

    fulltext: FullTextIndex

    def rank(self, query: str, k: int, *, vector: Vectors | None = None, read: Reader | None = None) -> Ranking:
        """By BM25."""
        return self.fulltext.search(query, k, self._allowed())

    def _query_vector(self, query: str) -> Vectors | None:
        return None  # whoever chose this one need not have the embedder at hand


class HybridRetriever(ChunkRetriever):
    """Nearest vectors and BM25, fused."""

    fulltext: FullTextIndex
    fusion: Literal["weighted", "rrf"] = "weighted"
    dense_weight: float | None = Field(default=None, ge=0, le=1)
    support: float = 0.1
    fetch: int = 100
    rescore: int = 20

    def rank(self, query: str, k: int, *, vector: Vectors | None = None, read: Reader | None = None) -> Ranking:
        """By fused score, raised where other chunks of the same document were found too, the best looked at again."""
        fetch = max(self.fetch, k)
        read = read or Reader(self.store.knowledge_base)
        vector = self.store.embed_query(query) if vector is None else vector
        # both engines work outside Python's lock; one of the two threads is this one
        nearest_coming = _second_thread(os.getpid()).submit(self._nearest, vector, fetch, read)
        lexical = self.fulltext.search(query, fetch, self._allowed())
        if not nearest_coming.done():  # a big index: the other half of what is looked at again is read meanwhile
            read.chunks(i for i, _ in lexical[: self.rescore // 2])
        weights = self._weights(query, lexical, read)
        nearest = nearest_coming.result()
        if self.fusion == "rrf":
            fused = fuse_ranks([lexical, nearest], weights)
        else:
            fused = fuse_scores([lexical, above_last(nearest)], weights, cut=fetch)
        fused = fused[: max(k, _SUPPORTED)]
        documents = self.store.knowledge_base.document_ids(i for i, _ in fused)
        ranking = with_support(fused, documents, self.support)
        if self.fusion == "weighted" and self.rescore:
            ranking = self._looked_at_again(query, ranking, weights[0], read)
        return ranking[:k]

    def _nearest(self, vector: Vectors, fetch: int, read: Reader) -> Ranking:
        nearest = self.store.search_ids(vector, fetch, self.filter)
        read.chunks(i for i, _ in nearest[: self.rescore // 2])  # most are looked at again; BM25 takes longer than this
        return nearest

    def _weights(self, query: str, lexical: Ranking, read: Reader) -> list[float]:
        """Weights of the lexical and the dense leg.

        The best of BM25 may be bad, when a question is worded unlike all documents. Beside an embedder that could know
        better, the lexical leg weighs no more than the share of the question that its first hits mention.
        """
        if _is_lexical(self.store):
            dense = _LEXICAL_WEIGHT if self.dense_weight is None else self.dense_weight
            return [1 - dense, dense]
        dense = _SEMANTIC_WEIGHT if self.dense_weight is None else self.dense_weight
        if self.fusion == "rrf":
            return [1 - dense, dense]
        first = read.chunks(i for i, _ in lexical[:_FIRST])
        shares = [coverage(query, text_with_context(chunk.text, chunk.metadata)) for chunk in first.values()]
        return [(1 - dense) * max(shares, default=0.0), dense]

    def _looked_at_again(self, query: str, ranking: Ranking, weight: float, read: Reader) -> Ranking:
        chunks = read.chunks(i for i, _ in ranking[: self.rescore])
        raises = closeness(query, chunks.values())
        raised = {i: score + weight * raises[i] for i, score in ranking if i in raises}
        return in_order(raised) + ranking[self.rescore :]


class StoreRetriever(BaseRetriever):
    """The `top_k` nearest documents of any LangChain vector store, reranked where a reranker is given."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    vectorstore: VectorStore
    top_k: int = Field(default=5, ge=1)
    reranker: BaseDocumentCompressor | None = None
    rerank_fetch: int = Field(default=20, ge=1)

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        if self.reranker is None:
            return self.vectorstore.similarity_search(query, k=self.top_k)
        documents = self.vectorstore.similarity_search(query, k=max(self.top_k, self.rerank_fetch))
        return list(self.reranker.compress_documents(documents, query, callbacks=run_manager.get_child()))[: self.top_k]


@functools.cache
def _second_thread(process: int) -> ThreadPoolExecutor:
    """Where the dense legs of all questions run, in a process: a fork has none of the threads of its parent."""
    return ThreadPoolExecutor(thread_name_prefix=f"ragproj-dense-{process}")


def _is_lexical(store: FaissVectorStore) -> bool:
    return isinstance(store.embeddings, LexicalEmbeddings)


def located(compressed: Sequence[Document], found: Sequence[Document]) -> list[Document]:
    """What a compressor made of the documents found, each with the id and the exact place of what it was made from.

    Text that was shortened is looked for in its document; where it is not there word for word, the whole document
    stands for it, so that every citation can be checked. Documents of the compressor's own are left as they are.
    """
    by_id = {document.id: document for document in found}
    by_place = {_place_of(document): document for document in found}
    result = []
    for document in compressed:
        origin = by_id.get(document.id) or by_place.get(_place_of(document))
        result.append(document if origin is None else _part_of(origin, document))
    return result


def _place_of(document: Document) -> tuple[str, ...]:
    return tuple(str(document.metadata.get(key)) for key in _FOUND_PLACE)


def _part_of(origin: Document, part: Document) -> Document:
    """What a document found has in common with the part a compressor left of it, at the part's place in the source."""
    text, offset = part.page_content, origin.page_content.find(part.page_content)
    if offset < 0 or not text:
        text, offset = origin.page_content, 0
    start = origin.metadata["start"] + offset
    place = {**{key: origin.metadata[key] for key in _FOUND_PLACE}, "start": start, "end": start + len(text)}
    return Document(id=origin.id, page_content=text, metadata={**origin.metadata, **part.metadata, **place})


def _with_place(chunk: StoredChunk, score: float) -> Document:
    """A chunk as it is found. `also_in` and `parts` are ours: a document's own field of that name is left out."""
    place: dict[str, Any] = {
        "source": chunk.source,
        "document_id": chunk.document_id,
        "start": chunk.start,
        "end": chunk.end,
        "score": round(score, 4),
    }
    if chunk.duplicates:  # the same text stands elsewhere, too
        place["also_in"] = [
            {key: str(other[key]) for key in ("source", "id", "title") if key in other} for other in chunk.duplicates
        ]
    metadata = {key: value for key, value in chunk.metadata.items() if key not in ("also_in", "parts")}
    return Document(id=chunk.key, page_content=chunk.text, metadata={**metadata, **place})
