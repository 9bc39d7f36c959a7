"""The gate's verdicts on hand-made measurements."""

from __future__ import annotations

import math

import pytest

from finetune.gate import GateConfig, compare, decide, forgets

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
