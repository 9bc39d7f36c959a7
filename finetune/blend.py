"""Mixtures of a fine-tuned model with its base: which shares are tried, and which of them is taken.

LM-Cocktail (Xiao et al. 2023) and WiSE-FT (Wortsman et al. 2022) mix weights so: less of what was learnt, and less of
what was forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

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
