"""A tiny model to train, and one thread to do it with."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))  # for `bge_models` and `training_tasks`


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny matrices are slower on two threads, and much slower where the other core is taken."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BGE-shaped BERT of two layers with dropout, random weights."""
    from bge_models import build_bert

    return build_bert(tmp_path_factory.mktemp("models") / "tiny")
