"""The golden checkpoint of the shared data, converted once."""

from __future__ import annotations

from pathlib import Path

import pytest

from chains.chatglm3.convert import convert_chatglm3


@pytest.fixture(scope="session")
def golden(shared_data: Path) -> Path:
    """A tiny checkpoint in the original layout, and what the original implementation computes with it."""
    return shared_data / "chatglm3_golden"


@pytest.fixture(scope="session")
def native(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden checkpoint as a native directory."""
    target = tmp_path_factory.mktemp("chatglm3") / "native"
    convert_chatglm3(golden / "checkpoint", target)
    return target
