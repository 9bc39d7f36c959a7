"""A tiny encoder to make a reranker of."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))  # for `bge_models` and `concept_rows`


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small are faster in one thread, and do not wait for each other on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BGE-shaped BERT of two layers, random weights, no head."""
    from bge_models import build_bert

    return build_bert(tmp_path_factory.mktemp("models") / "tiny")
