"""A tiny ChatGLM3 with random weights, whose sizes suit 4 bits, and one thread to train it with."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs the extra [models]")
pytest.importorskip("transformers", reason="needs the extra [models]")

sys.path.insert(0, str(Path(__file__).parents[2]))  # for `generation_tasks` and `training_tasks`


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny matrices are slower on two threads, and much slower where the other core is taken."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its tokenizer knows the words of the copy task."""
    from finetune.chatglm3.copy_task import build_tiny_model

    return build_tiny_model(tmp_path_factory.mktemp("tiny") / "model", hidden=64, layers=2, context=512)
