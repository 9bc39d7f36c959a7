"""Whether a trained model may take the place of the one it started from: only what gains, and forgets little."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import Field

from chains.metrics import Interval, paired_interval
from loaders.config import Config

DEV = "dev"
"""the set that must gain; all others must not lose"""
LEAST_SPLIT = 200
"""questions of dev from which on one half chooses the weights and the other judges them"""


class GateConfig(Config):
    """The bounds a run is held to, on the metric of the evaluation."""

    min_gain: float = Field(
        default=0.0, ge=0, description="mean gain on dev that must be exceeded; its 95 % interval must lie above zero"
    )
    max_loss: float = Field(default=0.01, ge=0, description="mean loss that is tolerated on any other set")
    blend: bool = Field(default=True, description="where a set lost more, try mixtures of the weights with the base's")
    seed: int = Field(default=0, description="of the bootstrap intervals")


@dataclass(frozen=True)
class DevParts:
    """Which questions of dev choose the checkpoint and the mixture, and which judge them: numbers in their order."""

    choosing: tuple[int, ...]
    judging: tuple[int, ...]

    @property
    def apart(self) -> bool:
        """Whether none does both. The best of ten checkpoints flatters itself on the questions that it is the best on:
        of such as gain nothing one run in five would pass."""
        return self.choosing != self.judging

    @property
    def zh(self) -> str:
        """What a reader must know of it, in Chinese."""
        if self.apart:
            return f"检查点和混合比例用 dev 的另外 {len(self.choosing)} 个问题挑选，不参与判定"
        return (
            f"注意：dev 只有 {len(self.judging)} 个问题（少于 {LEAST_SPLIT}），检查点和混合比例也是用它们挑选的，"
            "区间偏乐观，没有变好的模型也比 2.5 % 更容易通过"
        )

    @property
    def en(self) -> str:
        """What a reader must know of it, in English."""
        if self.apart:
            return f"checkpoint and mixture were chosen on {len(self.choosing)} other questions of dev"
        return (
            f"mind that dev has only {len(self.judging)} questions, fewer than {LEAST_SPLIT}, and checkpoint and"
            " mixture were chosen on the same: the interval flatters, and a model that gained nothing passes more often"
            " than in 2.5 % of runs"
        )


def dev_parts(questions: int, *, seed: int) -> DevParts:
    """The two halves of dev, drawn; all of it for both where it is too small to be halved."""
    if questions < LEAST_SPLIT:
        return DevParts(tuple(range(questions)), tuple(range(questions)))
    numbers = list(range(questions))
    random.Random(f"dev parts {seed}").shuffle(numbers)  # noqa: S311 a sample, no secret
    half = questions // 2
    return DevParts(tuple(sorted(numbers[:half])), tuple(sorted(numbers[half:])))


@dataclass(frozen=True)
class Comparison:
    """A set before and after: means of the metric, and the mean difference with its 95 % paired interval."""

    before: float
    after: float
    difference: Interval


@dataclass(frozen=True)
class Reason:
    """One sentence of a verdict, in both languages."""

    passed: bool
    zh: str
    en: str


@dataclass(frozen=True)
class Verdict:
    """Whether to promote, and why."""

    promoted: bool
    reasons: tuple[Reason, ...]
    parts: DevParts | None = None
    """of dev, where something was chosen before it was judged"""

    @property
    def zh(self) -> str:
        """The reasons in Chinese, those that failed first, then what chose."""
        reasons = [reason.zh for reason in sorted(self.reasons, key=lambda reason: reason.passed)]
        return "；".join(reasons if self.parts is None else [*reasons, self.parts.zh])

    @property
    def en(self) -> str:
        """The reasons in English, those that failed first, then what chose."""
        reasons = [reason.en for reason in sorted(self.reasons, key=lambda reason: reason.passed)]
        return "; ".join(reasons if self.parts is None else [*reasons, self.parts.en])


def compare(before: Sequence[float], after: Sequence[float], *, seed: int) -> Comparison:
    """Two measurements of the same questions, one value per question.

    Raises:
        ValueError: the two differ in length.
    """
    difference = paired_interval(before, after, seed=seed)
    return Comparison(_mean(before), _mean(after), difference)


def decide(
    before: Mapping[str, Sequence[float]], after: Mapping[str, Sequence[float]], config: GateConfig, *, metric: str
) -> Verdict:
    """The verdict on per-question values of one metric, by set; `dev` must be among them.

    A gain is one whose interval excludes zero: paired bootstrap over the questions (Koehn 2004 for the use of it).

    Args:
        before: of the base.
        after: of the candidate, the same sets and questions.
        config: the bounds.
        metric: its name, for the reasons.
    """
    reasons = []
    for name in sorted(before, key=lambda name: (name != DEV, name)):
        comparison = compare(before[name], after[name], seed=config.seed)
        judge = _on_dev if name == DEV else _elsewhere
        reasons.append(judge(name, comparison, config, metric))
    return Verdict(all(reason.passed for reason in reasons) and DEV in before, tuple(reasons))


def forgets(
    before: Mapping[str, Sequence[float]], after: Mapping[str, Sequence[float]], config: GateConfig
) -> list[str]:
    """Names of the sets other than dev that lost more than the bound."""
    return sorted(
        name for name in before if name != DEV and not _mean(after[name]) - _mean(before[name]) >= -config.max_loss
    )


def _on_dev(name: str, comparison: Comparison, config: GateConfig, metric: str) -> Reason:
    gain = comparison.difference
    passed = gain.mean > config.min_gain and gain.low > 0
    figures = _figures(comparison)
    if passed:
        return Reason(True, f"{name} 的 {metric} 提高：{figures}", f"{metric} on {name} gains: {figures}")
    if not math.isfinite(gain.mean):
        return Reason(False, f"{name} 的 {metric} 不是有效数值", f"{metric} on {name} is not a number")
    return Reason(
        False,
        f"{name} 的 {metric} 没有可靠的提高：{figures}，要求提高超过 {config.min_gain:g} 且区间在 0 以上",
        f"{metric} on {name} does not gain for certain: {figures}; it must gain more than {config.min_gain:g} with its"
        " interval above zero",
    )


def _elsewhere(name: str, comparison: Comparison, config: GateConfig, metric: str) -> Reason:
    figures = _figures(comparison)
    if comparison.difference.mean >= -config.max_loss:
        return Reason(
            True,
            f"{name} 的 {metric} 保持：{figures}，最多允许下降 {config.max_loss:g}",
            f"{metric} on {name} holds: {figures}, with {config.max_loss:g} allowed to be lost",
        )
    return Reason(
        False,
        f"{name} 的 {metric} 下降过多（遗忘）：{figures}，最多允许下降 {config.max_loss:g}",
        f"{metric} on {name} loses too much (forgetting): {figures}, with {config.max_loss:g} allowed",
    )


def _figures(comparison: Comparison) -> str:
    gain = comparison.difference
    return (
        f"{comparison.before:.4f} → {comparison.after:.4f} ({gain.mean:+.4f}, 95 % [{gain.low:+.4f}, {gain.high:+.4f}])"
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
