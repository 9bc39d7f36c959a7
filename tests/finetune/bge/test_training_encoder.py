"""Dropout and adapters of the encoder that is trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from training_tasks import training_config

from chains.bge.directory import read_model_directory
from finetune.bge.encoder import save_candidate, training_encoder
from loaders.errors import RagProjError


def test_dropout_of_the_config_replaces_the_models(tiny_model: Path) -> None:
    directory = read_model_directory(tiny_model)
    for share, expected in ((None, {0.1}), (0.3, {0.3})):
        encoder = training_encoder(training_config(tiny_model, Path("o"), dropout=share), directory, "cpu")
        assert {module.p for module in encoder.modules() if isinstance(module, torch.nn.Dropout)} == expected


def test_an_adapter_freezes_everything_else(tiny_model: Path) -> None:
    directory = read_model_directory(tiny_model)
    encoder = training_encoder(training_config(tiny_model, Path("o"), method="lora"), directory, "cpu")
    trained = [name for name, parameter in encoder.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    # by hand: 2 layers x (query, key, value, attention output, intermediate, output) x (A, B)
    assert len(trained) == 2 * 6 * 2


def test_adapter_targets_that_no_layer_has_are_refused(tiny_model: Path) -> None:
    config = training_config(tiny_model, Path("o"), method="lora", lora={"targets": ["q_proj"]})
    with pytest.raises(RagProjError, match="q_proj"):
        training_encoder(config, read_model_directory(tiny_model), "cpu")


def test_an_adapter_is_written_alike_by_every_process(tiny_model: Path, tmp_path: Path) -> None:
    config, directory = training_config(tiny_model, tmp_path, method="lora"), read_model_directory(tiny_model)
    save_candidate(training_encoder(config, directory, "cpu"), tmp_path / "adapter", directory, config)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert settings["target_modules"] == sorted(config.lora.targets)  # PEFT's own order is that of a set
