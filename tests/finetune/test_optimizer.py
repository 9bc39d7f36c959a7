"""Which parameters are trained, and with which decay."""

from __future__ import annotations

from pathlib import Path

import torch

from finetune.bge.config import BgeTrainingConfig
from finetune.optimizer import adamw, decay_groups


def layers() -> torch.nn.Module:
    """A matrix with its bias, a norm (two vectors), and a matrix that is frozen."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2), torch.nn.Linear(2, 2, bias=False))
    model[2].requires_grad_(False)
    return model


def test_matrices_decay_and_vectors_do_not() -> None:
    groups = decay_groups(layers(), 0.1)
    shapes = {group["weight_decay"]: sorted(tuple(one.shape) for one in group["params"]) for group in groups}
    assert shapes == {0.1: [(2, 3)], 0.0: [(2,), (2,), (2,)]}


def test_embeddings_have_a_rate_of_their_own() -> None:
    model = torch.nn.ModuleDict({"embeddings": torch.nn.Embedding(5, 2), "layer": torch.nn.Linear(2, 4, bias=False)})
    rates = {tuple(group["params"][0].shape): group["rate"] for group in decay_groups(model, 0.1, embedding_rate=8.0)}
    assert rates == {(5, 2): 8.0, (4, 2): 1.0}


def test_the_optimizer_has_the_settings_of_the_config() -> None:
    settings = {"learning_rate": 3e-4, "weight_decay": 0.2}
    optimizer = adamw(layers(), BgeTrainingConfig(model="m", output=Path("o"), train=["t"], **settings))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {group["lr"] for group in optimizer.param_groups} == {3e-4}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.2, 0.0}
