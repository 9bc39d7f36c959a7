"""The gate's verdicts on hand-made measurements."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from finetune.gate import LEAST_SPLIT, GateConfig, compare, decide, dev_parts, forgets

BEFORE = [0.0] * 40 + [1.0] * 60  # mean .60
BETTER = [0.0] * 20 + [1.0] * 80  # mean .80, twenty questions won and none lost
NOISY = [1.0] * 21 + [0.0] * 39 + [1.0] * 40  # mean .61: 21 won, 20 lost


def test_a_clear_gain_without_loss_elsewhere_is_promoted_with_its_numbers() -> None:
    verdict = decide({"dev": BEFORE, "news": BEFORE}, {"dev": BETTER, "news": BEFORE}, GateConfig(), metric="ndcg@10")
    assert verdict.promoted
    assert "0.6000 → 0.8000 (+0.2000, 95 % [+0.1" in verdict.zh
    assert "ndcg@10 on dev gains" in verdict.en


def test_the_same_weights_are_refused() -> None:
    verdict = decide({"dev": BEFORE}, {"dev": BEFORE}, GateConfig(), metric="ndcg@10")
    assert not verdict.promoted
    assert "没有可靠的提高" in verdict.zh


def test_a_gain_within_chance_is_refused() -> None:
    # 21 wins against 20 losses: the sign test gives p = 1, far from certain
    verdict = decide({"dev": BEFORE}, {"dev": NOISY}, GateConfig(), metric="ndcg@10")
    assert not verdict.promoted


def test_a_certain_gain_below_the_one_asked_for_is_refused() -> None:
    assert not decide({"dev": BEFORE}, {"dev": BETTER}, GateConfig(min_gain=0.25), metric="mrr@10").promoted
    assert decide({"dev": BEFORE}, {"dev": BETTER}, GateConfig(min_gain=0.15), metric="mrr@10").promoted


def test_forgetting_elsewhere_is_refused_and_named_first() -> None:
    worse = [0.0] * 45 + [1.0] * 55  # mean .55, five lost
    verdict = decide({"dev": BEFORE, "news": BEFORE}, {"dev": BETTER, "news": worse}, GateConfig(), metric="ndcg@10")
    assert not verdict.promoted
    assert verdict.zh.startswith("news 的 ndcg@10 下降过多")
    assert decide(
        {"dev": BEFORE, "news": BEFORE}, {"dev": BETTER, "news": worse}, GateConfig(max_loss=0.06), metric="ndcg@10"
    ).promoted


def test_forgotten_sets_are_listed_but_dev_is_not_one_of_them() -> None:
    worse = [0.0] * 45 + [1.0] * 55
    before = {"dev": BEFORE, "a": BEFORE, "b": BEFORE}
    assert forgets(before, {"dev": worse, "a": worse, "b": BETTER}, GateConfig()) == ["a"]


def test_values_that_are_no_numbers_are_never_promoted() -> None:
    broken = [math.nan] * len(BEFORE)
    assert not decide({"dev": BEFORE}, {"dev": broken}, GateConfig(), metric="ndcg@10").promoted
    sets = {"dev": BETTER, "news": broken}
    assert not decide({"dev": BEFORE, "news": BEFORE}, sets, GateConfig(), metric="ndcg@10").promoted
    assert forgets({"dev": BEFORE, "news": BEFORE}, sets, GateConfig()) == ["news"]


def test_without_a_dev_set_nothing_is_promoted() -> None:
    assert not decide({"news": BEFORE}, {"news": BETTER}, GateConfig(), metric="ndcg@10").promoted


def test_a_comparison_of_different_questions_is_an_error() -> None:
    with pytest.raises(ValueError, match="shorter"):
        compare([1.0, 0.0], [1.0], seed=0)


def test_a_large_dev_is_halved_and_a_small_one_does_both_with_a_warning() -> None:
    parts = dev_parts(401, seed=0)
    assert (len(parts.choosing), len(parts.judging)) == (200, 201)
    assert sorted((*parts.choosing, *parts.judging)) == list(range(401))
    assert parts.apart
    assert dev_parts(401, seed=0) == parts
    assert dev_parts(401, seed=1) != parts
    small = dev_parts(LEAST_SPLIT - 1, seed=0)
    assert small.choosing == small.judging == tuple(range(LEAST_SPLIT - 1))
    assert "199 questions, fewer than 200" in small.en
    assert "区间偏乐观" in small.zh


def test_the_best_of_ten_checkpoints_that_gain_nothing_passes_as_rarely_as_the_interval_says() -> None:
    """2.5 % of runs by the interval; chosen and judged on the same questions 1 - .975^10 = 22 % would."""
    draw = np.random.default_rng(7)
    before = [0.5] * 200
    runs = [draw.choice([0.0, 0.5, 1.0], size=(10, 200), p=[0.2, 0.6, 0.2]) for _ in range(100)]

    def passing(choosing: Sequence[int], judging: Sequence[int]) -> float:
        places, passed = list(judging), 0
        for checkpoints in runs:
            best = checkpoints[checkpoints[:, list(choosing)].mean(axis=1).argmax()]
            values = {"dev": [before[place] for place in places]}, {"dev": best[places].tolist()}
            passed += decide(*values, GateConfig(), metric="ndcg@10").promoted
        return passed / len(runs)

    parts, everything = dev_parts(200, seed=0), range(200)
    # 100 runs: 2.5 % with a standard deviation of 1.6 %
    assert passing(parts.choosing, parts.judging) <= 0.06
    assert passing(everything, everything) > 0.12
