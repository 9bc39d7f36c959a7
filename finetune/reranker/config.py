"""RerankerTrainingConfig: everything a training of a cross-encoder can be told, read from a YAML file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from finetune.bge.config import Precision
from finetune.doctor import DoctorConfig
from finetune.evaluation import EvaluationConfig
from finetune.gate import GateConfig
from loaders.config import Config, apply_overrides, read_yaml


class RerankerTrainingConfig(Config):
    """A training run of a reranker; all weights are trained."""

    model: str = Field(
        min_length=1, description="directory or model id that training starts from; an encoder gets a new head"
    )
    output: Path = Field(description="directory of the run: candidate, checkpoints, report")
    train: list[Path] = Field(min_length=1, description="JSONL files of query, pos, neg")

    epochs: float = Field(default=1.0, gt=0, description="times every row is seen")
    max_steps: int | None = Field(default=None, ge=1, description="optimizer steps instead of epochs")
    batch_size: int = Field(default=16, ge=1, description="rows per optimizer step, over all processes together")
    group_size: int = Field(default=8, ge=2, description="passages per row: one positive, the others negatives")
    learning_rate: float = Field(default=2e-5, gt=0, description="highest, at the end of the warm-up")
    warmup_share: float = Field(default=0.1, ge=0, lt=1, description="share of the steps that the rate rises from zero")
    weight_decay: float = Field(default=0.01, ge=0, description="of matrices; biases and norms have none")
    max_grad_norm: float | None = Field(default=1.0, gt=0, description="gradients are scaled down to it; null: never")
    seed: int = Field(default=42, ge=0, description="of order, sampling, dropout and a new head")
    distillation: bool = Field(default=False, description="follow the pos_scores and neg_scores of the rows as well")

    max_tokens: int = Field(
        default=512, ge=8, description="of query and passage together, with [CLS] and [SEP]; the passage is cut"
    )
    candidates: int = Field(
        default=20, ge=2, le=200, description="passages of a question that are reranked in an evaluation, found by BM25"
    )

    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:1 ...")
    precision: Precision = Field(default="auto", description="of the forward pass; weights stay float32")
    dropout: float | None = Field(default=None, ge=0, lt=1, description="in place of the model's; null: the model's")
    micro_batch_tokens: int | None = Field(
        default=None, ge=16, description="positions in one forward pass; null: 2,048 on CPU, 16,384 on a GPU"
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


def load_reranker_training_config(path: Path | None, overrides: Sequence[str] = ()) -> RerankerTrainingConfig:
    """The config of a YAML file with `key=value` overrides laid over it.

    Raises:
        ConfigError: lists every problem.
    """
    data = {} if path is None else read_yaml(path)
    where = "command line" if path is None else str(path)
    return RerankerTrainingConfig.from_dict(apply_overrides(data, overrides), where=where)
