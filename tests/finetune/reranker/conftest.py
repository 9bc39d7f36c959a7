"""A tiny encoder to make a reranker of."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))  # for `bge_models` and `concept_rows`


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BGE-shaped BERT of two layers, random weights, no head."""
    from bge_models import build_bert

    return build_bert(tmp_path_factory.mktemp("models") / "tiny")
