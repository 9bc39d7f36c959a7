"""`ragproj convert` as its users have it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ui.cli import main

pytest.importorskip("torch", reason="needs the extra [models]")


@pytest.fixture
def golden(shared_data: Path) -> Path:
    return shared_data / "chatglm3_golden"


def test_convert_there_and_back_again(golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    native, back = str(tmp_path / "native"), str(tmp_path / "back")
    assert main(["convert", "chatglm3", str(golden / "checkpoint"), native, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == {"target": native, "tensors": 17, "parameters": 397_888, "shards": 1, "already": False}
    assert main(["convert", "chatglm3", native, back, "--reverse"]) == 0
    assert "17 个张量" in capsys.readouterr().out
    weights = (golden / "checkpoint" / "model.safetensors").read_bytes()
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == weights
    assert main(["convert", "chatglm3", str(golden / "checkpoint"), native]) == 0
    assert "converted before" in capsys.readouterr().out


def test_convert_adapter(golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = str(tmp_path / "adapter")
    assert main(["convert", "adapter", str(golden / "adapter_original"), target, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"target": target, "tensors": 24}


def test_a_failed_conversion_exits_1_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "chatglm3", str(tmp_path / "absent"), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("ragproj convert chatglm3: 找不到模型目录")
    assert len(error.splitlines()) == 1


def test_settings_are_wrong_usage(golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["convert", "chatglm3", str(golden / "checkpoint"), str(tmp_path / "out"), "top_k=3"]
    assert main(words) == 2
    assert "top_k=3" in capsys.readouterr().err
