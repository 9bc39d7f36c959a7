"""Mixtures of a fine-tuned model with its base: less of what was learnt, less of what was forgotten.

W = base + share x (tuned - base), as LM-Cocktail (Xiao et al. 2023) and WiSE-FT (Wortsman et al. 2022) do. For a LoRA
adapter, whose update is the difference itself, it is the adapter scaled by the share.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from chains.bge.directory import ModelDirectory, read_model_directory
from chains.bge.encoder import load_encoder
from finetune.gate import DEV, GateConfig, Verdict, decide

# Of the fine-tuned weights. One of 1 is the candidate itself, 0 the base.
SHARES = (0.8, 0.6, 0.4, 0.2)

Values = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Mixture:
    """One that was tried."""

    share: float
    values: Values
    """of the metric, per question, by set"""
    verdict: Verdict

    @property
    def dev(self) -> float:
        """Mean on dev."""
        return sum(self.values[DEV]) / len(self.values[DEV])


def sweep(measure: Callable[[float], Values], before: Values, gate: GateConfig, *, metric: str) -> list[Mixture]:
    """Every mixture, measured and judged, in the order of `SHARES`.

    Args:
        measure: the values by set of the mixture with a share.
        before: those of the base.
        gate: the bounds.
        metric: its name, for the verdicts.
    """
    found = []
    for share in SHARES:
        values = measure(share)
        found.append(Mixture(share, values, decide(before, values, gate, metric=metric)))
    return found


def best(mixtures: Sequence[Mixture]) -> Mixture | None:
    """Of those that the gate lets pass the best on dev, the one with more of the fine-tuned weights among equals."""
    passing = [mixture for mixture in mixtures if mixture.verdict.promoted]
    return max(passing, key=lambda mixture: (mixture.dev, mixture.share), default=None)


def write_mixture(base: ModelDirectory, tuned: Path, share: float, target: Path) -> None:
    """Write the mixture as a directory of the same kind as the fine-tuned one; what stood at `target` is replaced.

    Args:
        base: directory that was fine-tuned.
        tuned: the model directory or the adapter directory that came of it.
        share: of the fine-tuned weights, 0 to 1.
        target: takes its name when it is whole.
    """
    temporary = target.with_name(f".{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    if (tuned / "adapter_config.json").is_file():
        shutil.copytree(tuned, temporary)
        _scale_adapter(temporary / "adapter_config.json", share)
    else:
        shutil.copytree(tuned, temporary, ignore=shutil.ignore_patterns("*.safetensors", "*.bin", "*.index.json"))
        mixed = load_encoder(read_model_directory(tuned))
        mix(mixed, load_encoder(base), share)
        cast("Any", mixed).save_pretrained(str(temporary))
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)


def mix(tuned: Any, base: Any, share: float) -> None:
    """Draw the parameters of `tuned` towards those of `base`, in place.

    Args:
        tuned: a torch module.
        base: one of the same shape.
        share: of the tuned parameters that stays.
    """
    import torch

    origin = dict(base.named_parameters())
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            parameter.copy_(torch.lerp(origin[name].to(parameter.device), parameter, share))


def _scale_adapter(config: Path, share: float) -> None:
    settings = json.loads(config.read_text(encoding="utf-8"))
    settings["lora_alpha"] = settings["lora_alpha"] * share
    config.write_text(json.dumps(settings, ensure_ascii=False, indent=2), encoding="utf-8")
