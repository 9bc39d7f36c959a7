"""BgeTrainingConfig: everything a training of a BGE retriever can be told, read from a YAML file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt, model_validator

from finetune.evaluation import EvaluationConfig
from finetune.lora import LoraSettings, Targets
from finetune.memory import graph_tokens_that_fit
from finetune.precision import Precision, device_kind
from finetune.training_config import BatchSize, TrainingConfig

if TYPE_CHECKING:
    from torch import nn

# Rows of a forward pass at most, by kind of device.
FORWARD_ROWS = {"cpu": 64, "cuda": 1_024}
# A machine's memory is shared with others; a GPU is taken as far as it is free when the training starts.
LEAST_GRAPH_TOKENS = {"cpu": 16_384, "cuda": 0}

Method = Literal["full", "lora"]
GroupSize = Annotated[int, Field(ge=1, description="passages per row: one positive, the others negatives")]


class BgeLora(LoraSettings):
    """Size and place of the adapter, with `method: lora`."""

    targets: Targets = Field(
        default=["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
    )


class RetrievalTrainingConfig(TrainingConfig):
    """What trainings on rows of query, positives and negatives share: those of retrievers and of rerankers."""

    free: ClassVar[frozenset[str]] = TrainingConfig.free | {"graph_tokens"}
    forward_tokens: ClassVar[Mapping[str, int]]
    """positions in one forward pass by kind of device: few stay in a processor's cache, many fill a GPU"""

    group_size: GroupSize = 4
    distillation: bool = Field(default=False, description="follow the pos_scores and neg_scores of the rows as well")

    precision: Precision = Field(default="auto", description="of the forward pass; weights stay float32")
    dropout: float | None = Field(default=None, ge=0, lt=1, description="in place of the model's; null: the model's")
    micro_batch_tokens: int | None = Field(
        default=None, ge=16, description="positions in one forward pass; null: as many as suit the device"
    )
    graph_tokens: int | None = Field(
        default=None,
        ge=0,
        description="positions of a step that are not encoded twice; less saves memory; null: as many as a GPU's free"
        " memory holds, 16384 on a CPU",
    )
    evaluation: EvaluationConfig = EvaluationConfig()

    def tokens_at_once(self, device: str) -> int:
        """Positions in one forward pass on a device."""
        return self.micro_batch_tokens or self.forward_tokens[device_kind(device)]

    def least_graph_tokens(self, device: str) -> int:
        """Positions whose graph is kept on a device however little memory is free."""
        return self.graph_tokens if self.graph_tokens is not None else LEAST_GRAPH_TOKENS[device_kind(device)]

    def graph_tokens_of(self, model: nn.Module, device: str, *, checkpointing: bool = False) -> int:
        """Positions whose graph is kept for a model that is in place on its device."""
        if self.graph_tokens is not None or device_kind(device) == "cpu":
            return self.least_graph_tokens(device)
        return graph_tokens_that_fit(model, device, checkpointing=checkpointing)


class BgeTrainingConfig(RetrievalTrainingConfig):
    """A training run of a BGE retriever."""

    forward_tokens: ClassVar[Mapping[str, int]] = {"cpu": 1_024, "cuda": 16_384}

    method: Method = Field(default="full", description="all weights, or a LoRA adapter beside frozen ones")
    lora: BgeLora = BgeLora()
    batch_size: BatchSize = 64

    embedding_rate: float = Field(
        default=1.0, gt=0, description="learning rate of the embeddings, as a multiple; 10 or more from random weights"
    )
    temperature: float = Field(
        default=0.02, gt=0, description="cosines are divided by it; smaller looks at the nearest"
    )
    in_batch_negatives: bool = Field(default=True, description="passages of the other rows are negatives, too")
    cross_device_negatives: bool = Field(default=True, description="so are those of the other processes")
    mask_duplicates: bool = Field(default=True, description="not those with the text of a positive")
    mask_same_document: bool = Field(default=True, description="nor other rows' passages of a positive's document")
    matryoshka: list[PositiveInt] = Field(
        default_factory=list, description="lengths of vector prefixes that shall serve alone; name the full length, too"
    )

    query_max_tokens: int = Field(
        default=64, ge=4, description="longer queries are cut; with [CLS], [SEP], instruction"
    )
    passage_max_tokens: int = Field(default=256, ge=4, description="longer passages are cut; with [CLS] and [SEP]")
    query_instruction: str | None = Field(
        default=None, description="put before queries, never before passages; null: the model's own (method full only)"
    )
    gradient_checkpointing: bool = Field(default=False, description="recompute layers: a third slower, far less memory")

    @model_validator(mode="after")
    def _has_negatives(self) -> BgeTrainingConfig:
        if self.group_size == 1 and not self.in_batch_negatives:
            raise ValueError(
                "group_size 1 without in_batch_negatives has no negatives: the loss is 0; use in_batch_negatives=true"
                " or group_size=2 or more / 没有负例，损失恒为 0；请设 in_batch_negatives=true 或 group_size≥2"
            )
        if self.group_size == 1 and self.distillation:
            raise ValueError(
                "distillation compares the passages of a group: use group_size=2 or more"
                " / 蒸馏比较同一组的片段：请设 group_size≥2"
            )
        return self

    @model_validator(mode="after")
    def _trains_something(self) -> BgeTrainingConfig:
        if self.method == "lora" and self.query_instruction is not None:
            raise ValueError(
                "an adapter keeps the query instruction of its base: remove query_instruction, or use method=full"
                " / LoRA 沿用底座的查询指令：请去掉 query_instruction，或改用 method=full"
            )
        return self
