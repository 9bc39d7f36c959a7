"""What a config's model and adapter mean: native as they are, original ones converted into the cache once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from chains.chatglm3.directories import cache_folder, native_adapter, native_directory
from chains.chatglm3.settings import ConversionError
from loaders.errors import RagProjError

pytest.importorskip("torch", reason="needs the extra [models]")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAGPROJ_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_native_directory_is_itself(native: Path, cache: Path) -> None:
    assert native_directory(str(native)) == native
    assert not cache.exists()


def test_an_original_directory_is_converted_once(golden: Path, native: Path, cache: Path) -> None:
    first = native_directory(str(golden / "checkpoint"))
    written = (first / "model.safetensors").stat().st_mtime_ns
    assert first.parent == cache
    assert (first / "config.json").read_bytes() == (native / "config.json").read_bytes()
    assert native_directory(str(golden / "checkpoint")) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == written


def test_other_weights_at_the_same_place_are_converted_anew(golden: Path, tmp_path: Path) -> None:
    source = tmp_path / "model"
    shutil.copytree(golden / "checkpoint", source)
    first = native_directory(str(source))
    source.chmod(0o755)
    data = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").unlink()
    (source / "model.safetensors").write_bytes(data)
    assert native_directory(str(source)) != first


def test_an_adapter_that_is_not_there_is_named(native: Path) -> None:
    with pytest.raises(RagProjError, match=r"runs/nowhere is no LoRA adapter.*adapter=null"):
        native_adapter("runs/nowhere", native)


def test_an_original_adapter_is_converted_once_and_a_native_one_is_itself(golden: Path, native: Path) -> None:
    converted = native_adapter(str(golden / "adapter_original"), native)
    assert native_adapter(str(golden / "adapter_original"), native) == converted
    assert native_adapter(str(converted), native) == converted


def test_what_is_neither_directory_nor_model_id_is_named() -> None:
    with pytest.raises(ConversionError, match="no model directory /nowhere/at/all"):
        native_directory("/nowhere/at/all")


def test_a_model_id_that_cannot_be_downloaded_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConversionError, match=r"no directory nobody/nothing.*offline mode is enabled.*check the path"):
        native_directory("nobody/nothing")


def test_a_model_id_without_a_network_is_told_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(ConversionError, match=r"no directory nobody/nothing.*check the path or the network"):
        native_directory("nobody/nothing")


def test_a_name_that_no_model_can_have_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConversionError, match=r"no directory a\.\.b/c"):
        native_directory("a..b/c")


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAGPROJ_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "ragproj"
