"""How long a training is, and how high its learning rate stands at each step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from finetune.training_config import TrainingConfig


@dataclass(frozen=True)
class Schedule:
    """The optimizer steps of a run, counted from 0."""

    steps_per_epoch: int
    steps: int
    warmup: int

    @classmethod
    def of(cls, config: TrainingConfig, steps_per_epoch: int) -> Schedule:
        """The steps that a config asks for, where an epoch has so many."""
        steps = config.max_steps or math.ceil(steps_per_epoch * config.epochs)
        return cls(steps_per_epoch, steps, math.ceil(steps * config.warmup_share))

    def rate(self, step: int) -> float:
        """Share of the highest learning rate at a step: transformers' `linear` schedule."""
        if step < self.warmup:
            return step / self.warmup
        return (self.steps - step) / max(1, self.steps - self.warmup)
