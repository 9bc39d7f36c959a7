"""Precision, dropout and adapters of the encoder that is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from training_tasks import training_config

from chains.bge.directory import read_model_directory
from finetune.bge.encoder import PrecisionError, choose_device, choose_numbers, training_encoder
from loaders.errors import RagProjError


def test_float16_needs_a_gpu() -> None:
    with pytest.raises(PrecisionError, match="precision=auto"):
        choose_numbers("fp16", "cpu")


def test_each_precision_has_its_type() -> None:
    assert choose_numbers("fp32", "cpu").dtype is None
    assert choose_numbers("bf16", "cpu").dtype is torch.bfloat16
    assert choose_numbers("fp16", "cuda:0").scaled
    assert not choose_numbers("bf16", "cuda:0").scaled


def test_bfloat16_is_automatic_only_where_the_processor_multiplies_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert choose_numbers("auto", "cpu").dtype is None
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert choose_numbers("auto", "cpu").dtype is torch.bfloat16


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == "cpu"
    with pytest.raises(PrecisionError):
        choose_device("cuda")


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
