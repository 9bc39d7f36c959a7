"""How long a run is and how its learning rate goes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from finetune.bge.config import BgeTrainingConfig
from finetune.schedule import Schedule


def test_the_rate_rises_and_falls_as_transformers_linear_schedule_does() -> None:
    from transformers import get_linear_schedule_with_warmup

    schedule = Schedule(steps_per_epoch=5, steps=20, warmup=4)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    reference = get_linear_schedule_with_warmup(optimizer, schedule.warmup, schedule.steps)
    for step in range(schedule.steps):
        assert schedule.rate(step) == pytest.approx(reference.get_last_lr()[0])
        optimizer.step()
        reference.step()


def test_steps_come_from_epochs_or_are_given() -> None:
    config = BgeTrainingConfig(model="m", output=Path("o"), train=["t"], epochs=2.5, warmup_share=0.1)
    assert Schedule.of(config, 7) == Schedule(7, 18, 2)  # 17.5 and 1.8, rounded up
    assert Schedule.of(config.model_copy(update={"max_steps": 5}), 7) == Schedule(7, 5, 1)
