"""Several workers over one model: the same training as one, the same bits each time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training_tasks import make_rows, training_config

from chains.bge.directory import read_model_directory
from chains.bge.encoder import load_encoder
from finetune.bge.train import train
from finetune.bge.workers import Workers
from finetune.training_loop import TrainingEvent, TrainingResult


@pytest.fixture
def two_cores() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def run(model: Path, output: Path, *, die_after: int | None = None, **settings: object) -> TrainingResult:
    def observe(event: TrainingEvent) -> None:
        if event.step == die_after and event.loss is not None:
            raise InterruptedError

    config = training_config(model, output, checkpoint_steps=2, **settings)
    return train(config, make_rows(60), observe=observe)


def difference(one: TrainingResult, other: TrainingResult) -> float:
    left, right = (load_file(next(result.candidate.glob("*.safetensors"))) for result in (one, other))
    # the biases of keys have no gradient but rounding, which Adam brings to full size
    return max(float((left[name] - right[name]).abs().max()) for name in left if "key.bias" not in name)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_two_workers_train_as_one_does(tiny_model: Path, tmp_path: Path, two_cores: None, method: str) -> None:
    assert Workers.fitting("cpu") == 2
    together = run(tiny_model, tmp_path / "two", method=method)
    torch.set_num_threads(1)
    alone = run(tiny_model, tmp_path / "one", method=method)
    np.testing.assert_allclose(together.losses, alone.losses, rtol=1e-4)
    assert difference(together, alone) < 1e-4


def test_two_workers_resume_to_the_bit(tiny_model: Path, tmp_path: Path, two_cores: None) -> None:
    whole = run(tiny_model, tmp_path / "whole")
    with pytest.raises(InterruptedError):
        run(tiny_model, tmp_path / "broken", die_after=3)
    resumed = run(tiny_model, tmp_path / "broken")
    assert resumed.losses == whole.losses
    assert difference(resumed, whole) == 0


def test_layers_that_are_recomputed_leave_one_worker(tiny_model: Path, tmp_path: Path, two_cores: None) -> None:
    plain = run(tiny_model, tmp_path / "plain")
    recomputed = run(tiny_model, tmp_path / "recomputed", gradient_checkpointing=True)
    np.testing.assert_allclose(recomputed.losses, plain.losses, rtol=1e-4)


def test_shares_are_balanced_and_in_order(tiny_model: Path) -> None:
    workers = Workers(load_encoder(read_model_directory(tiny_model)), 3)
    costs = [9, 8, 7, 7, 5, 4, 4, 1]
    shares = workers.shares(costs)
    assert sorted(number for share in shares for number in share) == list(range(8))
    assert all(share == sorted(share) for share in shares)
    sums = [sum(costs[number] for number in share) for share in shares]
    assert max(sums) - min(sums) <= 4
    assert workers.shares([5]) == [[0], [], []]


def test_views_see_new_weights_and_keep_gradients_apart(tiny_model: Path) -> None:
    model = load_encoder(read_model_directory(tiny_model)).train()
    workers = Workers(model, 2)
    mine, its = (next(iter(each.parameters())) for each in workers.models)
    with torch.no_grad():
        mine.add_(1.0)
    assert torch.equal(mine, its)
    its.grad = torch.ones_like(its)
    assert mine.grad is None
    workers.add_up()
    assert its.grad is None
    assert mine.grad is not None
    assert float(mine.grad.sum()) == mine.numel()
