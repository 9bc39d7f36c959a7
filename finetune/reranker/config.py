"""RerankerTrainingConfig: everything a training of a cross-encoder can be told, read from a YAML file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field

from finetune.bge.config import GroupSize, RetrievalTrainingConfig


class RerankerTrainingConfig(RetrievalTrainingConfig):
    """A training run of a reranker; all weights are trained. `model` may be an encoder, which gets a new head."""

    free: ClassVar[frozenset[str]] = RetrievalTrainingConfig.free | {"candidates"}
    forward_tokens: ClassVar[Mapping[str, int]] = {"cpu": 2_048, "cuda": 16_384}

    group_size: GroupSize = Field(default=8, ge=2)
    max_tokens: int = Field(
        default=512, ge=8, description="of query and passage together, with [CLS] and [SEP]; the passage is cut"
    )
    candidates: int = Field(
        default=20, ge=2, le=200, description="passages of a question that are reranked in an evaluation, found by BM25"
    )
