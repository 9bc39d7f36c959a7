"""Mixtures of a fine-tuned model with its base: which shares are tried, which of them is taken, and their weights.

LM-Cocktail (Xiao et al. 2023) and WiSE-FT (Wortsman et al. 2022) mix weights so: less of what was learnt, and less of
what was forgotten.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.directories import replaced
from finetune.gate import DEV, GateConfig, Verdict, decide

# Of the fine-tuned weights. One of 1 is the candidate itself, 0 the base.
SHARES = (0.8, 0.6, 0.4, 0.2)

_ADAPTER = "adapter_config.json"

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


def write_scaled_adapter(adapter: Path, share: float, target: Path) -> None:
    """Write an adapter whose update is scaled by the share: that of the mixture of its model with the base.

    Args:
        adapter: a directory of PEFT's.
        share: 0 to 1.
        target: takes its name when it is whole; what stood there is replaced.
    """
    settings = json.loads((adapter / _ADAPTER).read_text(encoding="utf-8"))
    settings["lora_alpha"] = settings["lora_alpha"] * share
    with replaced(target) as folder:
        shutil.copytree(adapter, folder, dirs_exist_ok=True)
        (folder / _ADAPTER).write_text(json.dumps(settings, ensure_ascii=False, indent=2), encoding="utf-8")
