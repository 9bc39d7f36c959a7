"""BgeTrainingConfig: everything a training of a BGE retriever can be told, read from a YAML file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from finetune.doctor import DoctorConfig
from finetune.evaluation import EvaluationConfig
from finetune.gate import GateConfig
from loaders.config import Config, apply_overrides, read_yaml

Method = Literal["full", "lora"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]


class LoraSettings(Config):
    """Size of the adapter, with `method: lora`."""

    rank: int = Field(default=16, ge=1, description="of the two factors; more learns more and forgets more")
    alpha: float = Field(default=32.0, gt=0, description="the update is scaled by alpha / rank")
    dropout: float = Field(default=0.05, ge=0, lt=1, description="on the adapter's input")
    targets: list[str] = Field(
        default=["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"],
        min_length=1,
        description="linear layers that get an adapter, by the end of their names",
    )


class BgeTrainingConfig(Config):
    """A training run of a BGE retriever."""

    model: str = Field(min_length=1, description="directory or model id that training starts from")
    output: Path = Field(description="directory of the run: candidate, checkpoints, report")
    train: list[Path] = Field(min_length=1, description="JSONL files of query, pos, neg")
    method: Method = Field(default="full", description="all weights, or a LoRA adapter beside frozen ones")
    lora: LoraSettings = LoraSettings()

    epochs: float = Field(default=1.0, gt=0, description="times every row is seen")
    max_steps: int | None = Field(default=None, ge=1, description="optimizer steps instead of epochs")
    batch_size: int = Field(default=64, ge=1, description="rows per optimizer step, over all processes together")
    group_size: int = Field(default=4, ge=1, description="passages per row: one positive, the others negatives")
    learning_rate: float = Field(default=2e-5, gt=0, description="highest, at the end of the warm-up")
    warmup_share: float = Field(default=0.1, ge=0, lt=1, description="share of the steps that the rate rises from zero")
    weight_decay: float = Field(default=0.01, ge=0, description="of matrices; biases and norms have none")
    max_grad_norm: float | None = Field(default=1.0, gt=0, description="gradients are scaled down to it; null: never")
    seed: int = Field(default=42, ge=0, description="of order, sampling and dropout")

    temperature: float = Field(
        default=0.02, gt=0, description="cosines are divided by it; smaller looks at the nearest"
    )
    in_batch_negatives: bool = Field(default=True, description="passages of the other rows are negatives, too")
    cross_device_negatives: bool = Field(default=True, description="so are those of the other processes")
    mask_duplicates: bool = Field(default=True, description="not those with the text of a positive")
    mask_same_document: bool = Field(default=True, description="nor other rows' passages of a positive's document")
    distillation: bool = Field(default=False, description="follow the reranker's pos_scores and neg_scores as well")
    matryoshka: list[int] = Field(
        default_factory=list, description="lengths of vector prefixes that shall serve alone; name the full length, too"
    )

    query_max_tokens: int = Field(
        default=64, ge=4, description="longer queries are cut; with [CLS], [SEP], instruction"
    )
    passage_max_tokens: int = Field(default=256, ge=4, description="longer passages are cut; with [CLS] and [SEP]")
    query_instruction: str | None = Field(
        default=None, description="put before queries, never before passages; null: the model's own (method full only)"
    )

    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:1 ...")
    precision: Precision = Field(default="auto", description="of the forward pass; weights stay float32")
    dropout: float | None = Field(default=None, ge=0, lt=1, description="in place of the model's; null: the model's")
    gradient_checkpointing: bool = Field(default=False, description="recompute layers: a third slower, far less memory")
    micro_batch_tokens: int | None = Field(
        default=None, ge=16, description="positions in one forward pass; null: 1,024 on CPU, 16,384 on a GPU"
    )
    graph_tokens: int = Field(
        default=16_384, ge=0, description="positions of a step that are not encoded twice; less saves memory"
    )

    checkpoint_steps: int | None = Field(
        default=None, ge=1, description="steps between resumable checkpoints; null: ten in the whole run"
    )
    log_steps: int = Field(default=10, ge=1, description="steps between log lines")
    evaluation: EvaluationConfig = EvaluationConfig()
    gate: GateConfig = GateConfig()
    doctor: DoctorConfig = DoctorConfig()

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


def load_bge_training_config(path: Path | None, overrides: Sequence[str] = ()) -> BgeTrainingConfig:
    """The config of a YAML file with `key=value` overrides laid over it.

    Raises:
        ConfigError: lists every problem.
    """
    data = {} if path is None else read_yaml(path)
    where = "command line" if path is None else str(path)
    return BgeTrainingConfig.from_dict(apply_overrides(data, overrides), where=where)
