"""BgeReranker: a cross-encoder that reads question and passage together and says how well one answers the other."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from chains.bge.cross_encoder import PairIds
from chains.bge.directory import read_model_directory, resolve_model
from chains.bge.engines import DtypeName, Engine, RerankerEngineName, devices
from chains.bge.pool import EnginePool
from chains.bge.reranker_engines import CrossEncoderFactory, sigmoid
from chains.bge.tokenizer import BgeTokenizer
from chains.embeddings import Vectors
from chains.lora import resolve_adapter
from loaders.splitters import text_with_context


class BgeReranker(BaseDocumentCompressor, BaseModel):
    """Orders passages by a bge-reranker; weights load with the first question, one object may serve many threads.

    A document's `rerank_score` is the reranker's, through a sigmoid in [0, 1]. `score`, by which the chain refuses, is
    the higher one of that and what the retriever had found: a reranker trained on orders alone says nothing by the
    height of its scores, and must not silence the others.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(description="directory of the model, or a model id that is fetched once")
    adapter: str | None = Field(default=None, description="directory of a LoRA adapter trained on it")
    engine: RerankerEngineName = Field(
        default="auto", description="what computes; `auto` takes the fastest that agrees with the reference"
    )
    max_length: int = Field(default=512, ge=8, description="tokens of question and passage together")
    device: str | None = Field(
        default=None, description='"cpu", "cuda" for every GPU, or some of them; GPUs where there are any without it'
    )
    dtype: DtypeName = Field(default="auto", description="of the engine `torch`")
    _loaded: _CrossEncoder | None = PrivateAttr(default=None)
    _lock: threading.Lock = PrivateAttr(default_factory=threading.Lock)

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """The documents, those first that answer best; equal scores keep their order."""
        logits = self.logits(
            [(query, text_with_context(document.page_content, document.metadata)) for document in documents]
        )
        # not by the sigmoid: above 17 it is 1 for all in float32
        order = sorted(range(len(documents)), key=lambda index: -logits[index])
        scores = sigmoid(logits)
        return [_scored(documents[index], float(scores[index])) for index in order]

    def scores(self, pairs: Sequence[tuple[str, str]]) -> Vectors:
        """How well each passage answers its question, (n,) float32 in [0, 1]."""
        return sigmoid(self.logits(pairs))

    def logits(self, pairs: Sequence[tuple[str, str]]) -> Vectors:
        """The model's raw scores of (question, passage), (n,) float32.

        Raises:
            ModelDirectoryError: there is no such reranker or adapter, or the engine's library is not installed.
        """
        return self._opened().logits(pairs)

    @property
    def running(self) -> Engine[PairIds]:
        """What computes (the first, where several GPUs do), its weights loaded."""
        return self._opened().pool.engines[0]

    def _opened(self) -> _CrossEncoder:
        with self._lock:
            if self._loaded is None:
                self._loaded = _CrossEncoder(self)
            return self._loaded


class _CrossEncoder:
    """Tokenizer and engine of a reranker."""

    def __init__(self, reranker: BgeReranker) -> None:
        directory = read_model_directory(resolve_model(reranker.model))
        adapter = None if reranker.adapter is None else resolve_adapter(reranker.adapter)
        self._tokenizer = BgeTokenizer.from_directory(directory)
        self._max_length = min(reranker.max_length, directory.max_tokens)
        # the factories go, and with them weights that only the choice of an engine needed
        factories = [
            CrossEncoderFactory(directory, adapter, self._tokenizer, device=device, dtype=reranker.dtype)
            for device in devices(reranker.device)
        ]
        self.pool = EnginePool([factory.open(reranker.engine) for factory in factories])

    def logits(self, pairs: Sequence[tuple[str, str]]) -> Vectors:
        """The model's raw scores, (n,) float32."""
        rows = [PairIds(*row) for row in self._tokenizer.encode_pairs(pairs, self._max_length)]
        return self.pool.compute(rows, width=1)[:, 0]


def _scored(document: Document, score: float) -> Document:
    found = document.metadata.get("score", 0.0)
    metadata = {**document.metadata, "rerank_score": round(score, 4), "score": round(max(score, found), 4)}
    return Document(id=document.id, page_content=document.page_content, metadata=metadata)
