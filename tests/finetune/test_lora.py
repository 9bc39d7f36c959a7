"""An adapter on a model of two layers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from finetune.lora import LoraSettings, add_adapter, save_adapter
from loaders.errors import RagProjError

pytest.importorskip("peft", reason="needs the extra [train]")


class Two(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 6), torch.nn.Linear(6, 2)
        self.config: dict[str, str] = {}  # PEFT asks for one


def settings(*targets: str) -> LoraSettings:
    return LoraSettings(rank=3, alpha=6.0, dropout=0.0, targets=list(targets))


def test_the_adapter_alone_is_trained() -> None:
    model = add_adapter(Two(), settings("first"), seed=1, task="FEATURE_EXTRACTION")
    trained = {tuple(parameter.shape) for parameter in model.parameters() if parameter.requires_grad}
    assert trained == {(3, 4), (6, 3)}  # rank x inputs, outputs x rank


def test_its_first_weights_are_those_of_the_seed() -> None:
    def first(seed: int) -> torch.Tensor:
        model = add_adapter(Two(), settings("first"), seed=seed, task="FEATURE_EXTRACTION")
        return next(parameter for name, parameter in model.named_parameters() if "lora_A" in name)

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


def test_it_is_written_with_its_base_and_its_targets_in_order(tmp_path: Path) -> None:
    model = add_adapter(Two(), settings("second", "first"), seed=1, task="FEATURE_EXTRACTION")
    save_adapter(model, tmp_path, base="some/base")
    written = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert written["base_model_name_or_path"] == "some/base"
    assert written["target_modules"] == ["first", "second"]  # PEFT's own order is that of a set
    assert (written["r"], written["lora_alpha"], written["lora_dropout"]) == (3, 6.0, 0.0)


def test_targets_that_no_layer_has_are_refused_by_name() -> None:
    with pytest.raises(RagProjError, match="third"):
        add_adapter(Two(), settings("third"), seed=1, task="FEATURE_EXTRACTION")
