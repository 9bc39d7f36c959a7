"""TrainingConfig: what every training is told, whatever is trained.

Each kind of model adds its own settings in a class of its own (`finetune.bge.config` ...), and gives other defaults
where its trainings need them; bound and meaning of a setting stand here, once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field

from finetune.doctor import DoctorConfig
from finetune.gate import GateConfig
from loaders.config import Config, apply_overrides, read_yaml

Epochs = Annotated[float, Field(gt=0, description="times every row is seen")]
BatchSize = Annotated[int, Field(ge=1, description="rows per optimizer step, over all processes together")]
LearningRate = Annotated[float, Field(gt=0, description="highest, at the end of the warm-up")]
WarmupShare = Annotated[float, Field(ge=0, lt=1, description="share of the steps that the rate rises from zero")]
WeightDecay = Annotated[float, Field(ge=0, description="of matrices; biases and norms have none")]


class JudgingConfig(Config):
    """When a model is judged while it is trained, and by what."""

    choosing: ClassVar[frozenset[str]] = frozenset({"metric", "every_steps", "patience", "seed"})
    """settings that decide which of a run's weights become the candidate; its questions count by themselves"""

    metric: str = Field(description="what the best checkpoint and the gate go by")
    every_steps: int | None = Field(
        default=None, ge=1, description="optimizer steps between evaluations; null: ten in the whole run"
    )
    patience: int | None = Field(
        default=None, ge=1, description="evaluations without a new best before the run stops; null: never stops early"
    )
    seed: int = Field(default=0, description="of what an evaluation samples, and of the part of dev that chooses")


class TrainingConfig(Config):
    """A training run of a model."""

    free: ClassVar[frozenset[str]] = frozenset(
        {"output", "train", "evaluation", "gate", "doctor", "checkpoint_steps", "log_steps", "device"}
    )
    """settings that do not change what the weights become; of the training files the rows count, not their names"""

    model: str = Field(min_length=1, description="directory or model id that training starts from")
    output: Path = Field(description="directory of the run: candidate, checkpoints, report")
    train: list[Path] = Field(min_length=1, description="JSONL files of the rows")

    epochs: Epochs = 1.0
    max_steps: int | None = Field(default=None, ge=1, description="optimizer steps instead of epochs")
    batch_size: BatchSize = 16
    learning_rate: LearningRate = 2e-5
    warmup_share: WarmupShare = 0.1
    weight_decay: WeightDecay = 0.01
    max_grad_norm: float | None = Field(default=1.0, gt=0, description="gradients are scaled down to it; null: never")
    seed: int = Field(default=42, ge=0, description="of order, sampling, dropout and of weights that are new")

    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:1 ...")
    checkpoint_steps: int | None = Field(
        default=None, ge=1, description="steps between resumable checkpoints; null: ten in the whole run"
    )
    log_steps: int = Field(default=10, ge=1, description="steps between log lines")
    evaluation: JudgingConfig
    gate: GateConfig = GateConfig()
    doctor: DoctorConfig = DoctorConfig()

    @classmethod
    def read(cls, path: Path | None, overrides: Sequence[str] = ()) -> Self:
        """The config of a YAML file with `key=value` overrides laid over it.

        Raises:
            ConfigError: lists every problem.
        """
        data = {} if path is None else read_yaml(path)
        where = "command line" if path is None else str(path)
        return cls.from_dict(apply_overrides(data, overrides), where=where)

    def deciding(self) -> dict[str, Any]:
        """The settings that decide the weights, as JSON values: those of the steps, and of the choice among them."""
        chosen = self.evaluation.model_dump(mode="json", include=set(self.evaluation.choosing))
        choice = {f"evaluation.{name}": value for name, value in sorted(chosen.items())}
        return {**self.model_dump(mode="json", exclude=set(self.free)), **choice}
