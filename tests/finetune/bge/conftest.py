"""A tiny model to train, and one thread to do it with."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="module", autouse=True)
def _one_thread(one_thread: None) -> None:
    pass


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BGE-shaped BERT of two layers with dropout, random weights."""
    from bge_models import build_bert

    return build_bert(tmp_path_factory.mktemp("models") / "tiny")
