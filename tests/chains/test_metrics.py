"""Metrics against hand counts; the origin of every expected number stands beside it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from itertools import combinations

import pytest

from chains.metrics import (
    bootstrap_interval,
    char_f1,
    contains_gold,
    exact_match,
    mrr_at_k,
    ndcg_at_k,
    normalise_answer,
    paired_interval,
    recall_at_k,
    refusal_scores,
    rouge_l,
)

RANKED = ["a", "b", "c", "d"]
Metric = Callable[[Sequence[str], Sequence[str], int], float]


# --- rankings


def test_recall_asks_whether_any_gold_passage_is_among_the_first_k() -> None:
    assert recall_at_k(RANKED, ["c"], 2) == 0.0
    assert recall_at_k(RANKED, ["c"], 3) == 1.0
    assert recall_at_k(RANKED, ["x", "c"], 3) == 1.0


def test_mrr_is_one_over_the_rank_of_the_first_gold_passage() -> None:
    assert mrr_at_k(RANKED, ["a"], 10) == 1.0
    assert mrr_at_k(RANKED, ["d", "c"], 10) == pytest.approx(1 / 3)
    assert mrr_at_k(RANKED, ["d"], 3) == 0.0


def test_ndcg_discounts_by_the_logarithm_of_the_rank() -> None:
    # by hand: gold at ranks 2 and 4, 1/log2(3) + 1/log2(5) over the ideal 1/log2(2) + 1/log2(3)
    expected = (0.6309297535714574 + 0.43067655807339306) / (1 + 0.6309297535714574)
    assert ndcg_at_k(RANKED, ["b", "d"], 10) == pytest.approx(expected)


def test_ndcg_is_one_when_more_gold_passages_exist_than_places() -> None:
    assert ndcg_at_k(RANKED, ["a", "b", "c"], 2) == pytest.approx(1.0)


def test_ndcg_of_one_gold_passage_beyond_k_is_zero() -> None:
    assert ndcg_at_k(RANKED, ["c"], 2) == 0.0


@pytest.mark.parametrize("metric", [recall_at_k, mrr_at_k, ndcg_at_k])
def test_ranking_metrics_are_zero_without_hits_or_gold(metric: Metric) -> None:
    assert metric([], ["a"], 10) == 0.0
    assert metric(RANKED, [], 10) == 0.0
    assert metric(RANKED, ["x"], 10) == 0.0


@pytest.mark.parametrize("metric", [recall_at_k, mrr_at_k, ndcg_at_k])
def test_two_chunks_of_one_document_take_one_place(metric: Metric) -> None:
    assert metric(["a", "a", "a", "b"], ["b"], 2) == metric(["a", "b"], ["b"], 2) > 0
    assert metric(["b", "b"], ["b"], 2) == 1.0


# --- answers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("《红楼梦》，（清）曹雪芹。", "红楼梦清曹雪芹"),
        ("ＲＡＧ-Proj v1.0", "ragprojv10"),
        ("臺灣 2008年", "台湾2008年"),
        ("A^B~C`D+E=F", "abcdef"),
        ("25℃ 😀", "25℃😀"),
        ("……—— \u3000\n", ""),
        ("", ""),
    ],
)
def test_normalising_drops_case_width_punctuation_and_space(text: str, expected: str) -> None:
    assert normalise_answer(text) == expected


def test_exact_match_needs_one_of_the_gold_answers() -> None:
    assert exact_match("《红楼梦》。", ["西游记", "红楼梦"]) == 1.0
    assert exact_match("红楼梦的作者", ["红楼梦"]) == 0.0


def test_contains_gold_finds_a_gold_answer_inside_the_answer() -> None:
    assert contains_gold("它发行于2008年，由某公司制作。", ["1999年", "２００８ 年"]) == 1.0
    assert contains_gold("它发行于2008年。", ["2009年"]) == 0.0


def test_char_f1_of_the_longest_common_run() -> None:
    # by hand: wanted 红楼梦 (3), given 曹雪芹的红楼梦 (7), common run 3: 2 * 3 / (3 + 7)
    assert char_f1("曹雪芹的《红楼梦》", ["红楼梦"]) == pytest.approx(0.6)
    # the run must be contiguous: of 甲乙丙 only one character in a row is in 甲x乙x丙
    assert char_f1("甲子乙丑丙", ["甲乙丙"]) == pytest.approx(2 * 1 / (3 + 5))


def test_char_f1_counts_a_latin_word_or_number_as_one_unit() -> None:
    # by hand: [4, 分, 钟] against [4, 分, 钟, 内]
    assert char_f1("4分钟内", ["4分钟"]) == pytest.approx(2 * 3 / (3 + 4))
    # [new, york] against [new, york, city]; 2008 and 2009 share no unit
    assert char_f1("New York City", ["new york"]) == pytest.approx(2 * 2 / (2 + 3))
    assert char_f1("2009", ["2008"]) == 0.0


def test_char_f1_takes_the_best_gold_answer() -> None:
    assert char_f1("武汉", ["北京", "武汉"]) == 1.0


def test_rouge_l_is_the_longest_common_subsequence() -> None:
    # by hand: 甲乙丙 is a subsequence of 甲子乙丑丙: 2 * 3 / (3 + 5)
    assert rouge_l("甲子乙丑丙", ["甲乙丙"]) == pytest.approx(0.75)
    # Lin 2004, section 3.1, by characters: "police killed the gunman" / "police kill the gunman" without spaces,
    # 21 and 19 letters, all 19 in order
    assert rouge_l("police kill the gunman", ["police killed the gunman"]) == pytest.approx(2 * 19 / (19 + 21))


def test_rouge_l_equals_the_plain_search_through_all_subsequences() -> None:
    rng = random.Random(7)
    for _ in range(60):
        left = "".join(rng.choice("天地人") for _ in range(rng.randint(1, 7)))
        right = "".join(rng.choice("天地人") for _ in range(rng.randint(1, 7)))
        shared = _subsequences(left) & _subsequences(right)
        common = max(map(len, shared), default=0)
        assert rouge_l(left, [right]) == pytest.approx(2 * common / (len(left) + len(right)))


def _subsequences(text: str) -> set[str]:
    return {"".join(chosen) for size in range(1, len(text) + 1) for chosen in combinations(text, size)}


@pytest.mark.parametrize("metric", [exact_match, contains_gold, char_f1, rouge_l])
def test_answer_metrics_are_one_for_the_gold_answer_itself(metric: Callable[[str, list[str]], float]) -> None:
    for gold in ("踢爆", "2008年", "New York", "a", "😀"):
        assert metric(gold, [gold]) == 1.0


@pytest.mark.parametrize("metric", [exact_match, contains_gold, char_f1, rouge_l])
def test_answer_metrics_are_zero_for_empty_answers_and_empty_gold(metric: Callable[[str, list[str]], float]) -> None:
    assert metric("", ["踢爆"]) == 0.0
    assert metric("踢爆", []) == 0.0
    assert metric("踢爆", ["。"]) == 0.0
    assert metric("", [""]) == 0.0


# --- question sets


def test_refusal_scores_by_hand() -> None:
    # refused: 1 rightly (3rd), 1 wrongly (1st); of the two unanswerable ones the 4th was answered
    scores = refusal_scores([True, False, True, False], [True, True, False, False])
    assert scores.precision == 0.5
    assert scores.recall == 0.5


def test_refusal_scores_without_a_chance_to_err_are_one() -> None:
    assert refusal_scores([False, False], [True, True]) == (1.0, 1.0)
    assert refusal_scores([], []) == (1.0, 1.0)


def test_refusal_scores_need_lists_of_one_length() -> None:
    with pytest.raises(ValueError, match="zip"):
        refusal_scores([True], [])


def test_interval_of_a_share_agrees_with_the_normal_approximation() -> None:
    # 0.8 of 400: standard error sqrt(.8 * .2 / 400) = .02, so 95 % is .8 +- 1.96 * .02
    interval = bootstrap_interval([1.0] * 320 + [0.0] * 80, seed=0)
    assert interval.mean == pytest.approx(0.8)
    assert interval.low == pytest.approx(0.7608, abs=0.004)
    assert interval.high == pytest.approx(0.8392, abs=0.004)


def test_interval_is_the_same_for_the_same_seed() -> None:
    rng = random.Random(1)
    values = [rng.random() for _ in range(50)]
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)


def test_interval_does_not_depend_on_how_much_is_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [float(i % 7) for i in range(101)]
    whole = bootstrap_interval(values, seed=5, rounds=500)
    monkeypatch.setattr("chains.metrics._DRAWS_AT_ONCE", 1_000)
    assert bootstrap_interval(values, seed=5, rounds=500) == pytest.approx(whole)


def test_wider_level_gives_a_wider_interval() -> None:
    values = [0.0, 1.0] * 30
    narrow, wide = (bootstrap_interval(values, seed=0, level=level) for level in (0.8, 0.99))
    assert wide.low < narrow.low < narrow.high < wide.high


def test_interval_of_one_value_is_that_value_and_of_none_is_nan() -> None:
    assert bootstrap_interval([0.4], seed=0) == (0.4, 0.4, 0.4)
    assert all(math.isnan(bound) for bound in bootstrap_interval([], seed=0))


def test_paired_interval_sees_a_gain_that_two_separate_ones_would_hide() -> None:
    rng = random.Random(2)
    before = [rng.random() for _ in range(100)]
    after = [value + 0.01 for value in before]
    gain = paired_interval(before, after, seed=0)
    assert gain == pytest.approx((0.01, 0.01, 0.01))
    assert bootstrap_interval(after, seed=0).low < bootstrap_interval(before, seed=0).high


def test_paired_interval_refuses_different_question_sets() -> None:
    with pytest.raises(ValueError, match="zip"):
        paired_interval([1.0], [1.0, 0.0], seed=0)
