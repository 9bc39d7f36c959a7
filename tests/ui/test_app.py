from __future__ import annotations

import socket
from typing import Any

import pytest

from loaders.errors import RagProjError
from ui.app import build_app, launch


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
