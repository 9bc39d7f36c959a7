"""BgeReranker: a cross-encoder that reads question and passage together and says how well one answers the other."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from langchain_core.callbacks import Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from chains.bge.batching import length_sorted_batches
from chains.bge.directory import ModelDirectory, ModelDirectoryError, read_model_directory, resolve_model
from chains.bge.engines import CPU_LIMITS, GPU_LIMITS, DtypeName, devices
from chains.bge.tokenizer import BgeTokenizer
from chains.embeddings import Vectors
from chains.lora import with_adapter
from loaders.splitters import text_with_context

_QUERY_SHARE = 0.75  # of `max_length`: what FlagReranker leaves a question at most


class BgeReranker(BaseDocumentCompressor, BaseModel):
    """Orders passages by a bge-reranker; weights load with the first question, one object may serve many threads.

    A document's `rerank_score` is the reranker's, through a sigmoid in [0, 1]. `score`, by which the chain refuses, is
    the higher one of that and what the retriever had found: a reranker trained on orders alone says nothing by the
    height of its scores, and must not silence the others.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(description="directory of the model, or a model id that is fetched once")
    adapter: str | None = Field(default=None, description="directory of a LoRA adapter trained on it")
    max_length: int = Field(default=512, ge=8, description="tokens of question and passage together")
    device: str | None = None
    dtype: DtypeName = "auto"
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
        scores = _sigmoid(logits)
        return [_scored(documents[index], float(scores[index])) for index in order]

    def scores(self, pairs: Sequence[tuple[str, str]]) -> Vectors:
        """How well each passage answers its question, (n,) float32 in [0, 1]."""
        return _sigmoid(self.logits(pairs))

    def logits(self, pairs: Sequence[tuple[str, str]]) -> Vectors:
        """The model's raw scores of (question, passage), (n,) float32."""
        with self._lock:
            if self._loaded is None:
                self._loaded = _CrossEncoder(self.model, self.adapter, self.max_length, self.device, self.dtype)
        return self._loaded.logits(pairs)


class _CrossEncoder:
    """Weights and tokenizer of a reranker."""

    def __init__(self, model: str, adapter: str | None, max_length: int, device: str | None, dtype: DtypeName) -> None:
        import torch

        self._directory = read_model_directory(resolve_model(model))
        self._tokenizer = BgeTokenizer.from_directory(self._directory)
        self._max_length = min(max_length, self._directory.max_tokens)
        self._device = devices(device)[0]
        on_gpu = self._device != "cpu"
        precision = ("float16" if on_gpu else "float32") if dtype == "auto" else dtype
        network = load_cross_encoder(self._directory, adapter, dtype=getattr(torch, precision))
        self._network: Any = network.to(self._device).eval()
        self._limits = GPU_LIMITS if on_gpu else CPU_LIMITS
        # XLM-RoBERTa knows one token type only
        self._typed = self._directory.model_type == "bert"

    def logits(self, pairs: Sequence[tuple[str, str]]) -> Vectors:
        """The model's raw scores, (n,) float32."""
        rows = self._tokenizer.encode_pairs(pairs, self._max_length, most_of_first=_QUERY_SHARE)
        result = np.zeros(len(pairs), np.float32)
        lengths = [len(ids) for ids, _ in rows]
        for batch in length_sorted_batches(lengths, self._limits.token_budget, self._limits.rows):
            result[batch] = self._scored([rows[index] for index in batch])
        return result

    def _scored(self, rows: Sequence[tuple[list[int], list[int]]]) -> Vectors:
        import torch

        from chains.bge.encoder import pad

        ids, mask = pad([ids for ids, _ in rows], self._tokenizer.pad_id)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids) if mask is None else mask}
        if self._typed:
            inputs["token_type_ids"] = pad([types for _, types in rows], 0)[0]
        with torch.inference_mode():
            outputs = self._network(**{name: tensor.to(self._device) for name, tensor in inputs.items()})
        return np.asarray(outputs.logits[:, 0].float().cpu().numpy(), dtype=np.float32)


def load_cross_encoder(directory: ModelDirectory, adapter: str | Path | None = None, *, dtype: Any = None) -> Any:
    """The directory's model for sequence classification with one label, in eval mode, on the CPU; training's too.

    Raises:
        ModelDirectoryError: weights are missing, or it is no reranker.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    from chains.bge.encoder import quiet

    try:
        with quiet():
            network, info = AutoModelForSequenceClassification.from_pretrained(
                str(directory.path), dtype=dtype or torch.float32, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ModelDirectoryError(
            f"无法载入重排模型 {directory.path}：{reason}", f"cannot load the reranker in {directory.path}: {reason}"
        ) from error
    if info["missing_keys"] or network.config.num_labels != 1:
        raise ModelDirectoryError(
            f"{directory.path} 不是重排模型（需要只有一个输出的分类头）；向量模型请写在 embeddings 里",
            f"{directory.path} is no reranker (a classifier with one label); an embedder belongs under `embeddings`",
        )
    if adapter is not None:
        network = with_adapter(network, adapter, directory.path, merge=True)
    return cast("Any", network).eval()


def _sigmoid(logits: Vectors) -> Vectors:
    """In float64, where -100 does not overflow."""
    return np.asarray(1 / (1 + np.exp(-logits.astype(np.float64))), dtype=np.float32)


def _scored(document: Document, score: float) -> Document:
    found = document.metadata.get("score", 0.0)
    metadata = {**document.metadata, "rerank_score": round(score, 4), "score": round(max(score, found), 4)}
    return Document(id=document.id, page_content=document.page_content, metadata=metadata)
