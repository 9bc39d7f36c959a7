from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from loaders.errors import RagProjError
from ui.app import build_app, launch
from ui.cli import main


def test_a_port_in_use_is_named_with_the_way_out(service: Any) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(RagProjError) as caught:
            launch(build_app(service, examples=[]), port=port, block=False)
    assert f"127.0.0.1:{port}" in caught.value.zh
    assert "端口已被占用" in caught.value.zh
    assert "the port is in use; choose another with --port" in caught.value.en


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Where `ragproj serve` would have served, which returns at once instead."""
    addresses: list[str] = []

    def note(app: Any, *, host: str, port: int, auth: object) -> str:
        addresses.append(f"{host}:{port}")
        return addresses[-1]

    monkeypatch.setattr("ui.app.launch", note)
    return addresses


def test_serve_loads_its_models_first_so_that_a_missing_one_is_told_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], launched: list[str]
) -> None:
    words = ["serve", "--kb", str(tmp_path / "kb"), "--port", "0", "llm._type=chatglm3", f"llm.model={tmp_path}/none"]
    assert main(words) == 1
    told = capsys.readouterr().err
    assert told.index(f"加载 / loading: {tmp_path}/none") < told.index(f"ragproj serve: 找不到模型目录 {tmp_path}/none")
    assert launched == []


def test_serve_can_leave_loading_to_the_first_question(tmp_path: Path, launched: list[str]) -> None:
    words = ["serve", "--kb", str(tmp_path / "kb"), "--port", "0", "llm._type=chatglm3", f"llm.model={tmp_path}/none"]
    assert main([*words, "--no-preload"]) == 0
    assert len(launched) == 1


def test_a_port_that_does_not_exist_is_refused(service: Any) -> None:
    with pytest.raises(RagProjError, match=r"127\.0\.0\.1:70000"):
        launch(build_app(service, examples=[]), port=70000, block=False)


def test_the_page_starts_in_the_language_and_with_the_settings_it_is_given(service: Any) -> None:
    parts = {
        part["props"].get("elem_id"): part["props"]
        for part in build_app(service, examples=[], language="en", top_k=30).get_config_file()["components"]
    }
    assert parts["send"]["value"] == "Send"
    assert parts["generator"]["value"] == "extractive"
    assert parts["generator"]["choices"] == [
        ("Quotes from the documents (no language model)", "extractive"),
        ("大模型", "chat"),
    ]
    assert (parts["top-k"]["value"], parts["top-k"]["maximum"]) == (30, 30)


def test_the_page_reports_to_nobody(service: Any) -> None:
    assert build_app(service, examples=[]).analytics_enabled is False
