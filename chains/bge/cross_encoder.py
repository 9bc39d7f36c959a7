"""The cross-encoder of a reranker in torch, and what it reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from chains.bge.directory import ModelDirectory, ModelDirectoryError
from chains.lora import with_adapter

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class PairIds:
    """A question and a passage as the model reads them."""

    ids: list[int]
    """Token ids, [CLS] and [SEP] included."""
    types: list[int]
    """Of each token: 0 for the question's, 1 for the passage's. XLM-RoBERTa knows one type only and reads none."""

    def __len__(self) -> int:
        return len(self.ids)


def load_cross_encoder(
    directory: ModelDirectory, adapter: str | Path | None = None, *, device: str | torch.device = "cpu"
) -> torch.nn.Module:
    """The directory's model for sequence classification with one label, in float32 and eval mode, an adapter merged.

    Raises:
        ModelDirectoryError: weights are missing, or it is no reranker, or the adapter does not fit.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    from chains.bge.encoder import quiet

    try:
        with quiet():
            network, info = AutoModelForSequenceClassification.from_pretrained(
                str(directory.path), dtype=torch.float32, output_loading_info=True
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
    return cast("torch.nn.Module", network.to(device).eval())
