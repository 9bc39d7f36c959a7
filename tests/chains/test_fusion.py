"""Fusion, support and variety of rankings, against counts by hand."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from langchain_core.vectorstores.utils import maximal_marginal_relevance

from chains.fusion import above_last, diversify, fuse_ranks, fuse_scores, in_order, with_support


def test_reciprocal_rank_fusion_equals_the_hand_count() -> None:
    """Cormack, Clarke & Buettcher 2009, k = 60, both rankings of weight 1; counted by hand as fractions."""
    lexical = [(1, 9.0), (2, 5.0), (3, 1.0)]
    dense = [(3, 0.9), (1, 0.8), (4, 0.7)]
    expected = {
        1: Fraction(1, 61) + Fraction(1, 62),
        3: Fraction(1, 63) + Fraction(1, 61),
        2: Fraction(1, 62),
        4: Fraction(1, 63),
    }
    fused = fuse_ranks([lexical, dense], [1, 1])
    assert [chunk for chunk, _ in fused] == [1, 3, 2, 4]
    assert dict(fused) == pytest.approx({chunk: float(score) for chunk, score in expected.items()})


def test_reciprocal_rank_fusion_weighs_its_rankings() -> None:
    # 0.9 / 61 for the first of the first, 0.1 / 61 for the first of the second
    fused = fuse_ranks([[(7, 1.0)], [(8, 1.0)]], [0.9, 0.1])
    assert dict(fused) == pytest.approx({7: 0.9 / 61, 8: 0.1 / 61})


def test_reciprocal_rank_fusion_does_not_look_at_scores() -> None:
    assert fuse_ranks([[(1, 100.0), (2, 99.9)]], [1]) == fuse_ranks([[(1, 0.2), (2, -5.0)]], [1])


@pytest.mark.parametrize("fuse", [fuse_ranks, fuse_scores])
def test_fusion_breaks_ties_by_id_and_takes_empty_rankings(fuse: Callable[..., list[tuple[int, float]]]) -> None:
    tied = fuse([[(9, 1.0)], [(3, 1.0)]], [0.5, 0.5])
    assert [chunk for chunk, _ in tied] == [3, 9]
    assert fuse([[], []], [0.5, 0.5]) == []
    assert [chunk for chunk, _ in fuse([[], [(3, 1.0)]], [0.5, 0.5])] == [3]


@pytest.mark.parametrize("fuse", [fuse_ranks, fuse_scores])
def test_fusion_needs_a_weight_for_each_ranking(fuse: Callable[..., list[tuple[int, float]]]) -> None:
    with pytest.raises(ValueError, match="shorter"):
        fuse([[(1, 1.0)], [(2, 1.0)]], [1.0])


def test_score_fusion_equals_the_hand_count() -> None:
    # divided by their best: {1: 1, 2: .5} and {2: 1, 3: .25}; weights .6 and .4
    fused = fuse_scores([[(1, 8.0), (2, 4.0)], [(2, 0.8), (3, 0.2)]], [0.6, 0.4])
    assert [chunk for chunk, _ in fused] == [2, 1, 3]
    assert dict(fused) == pytest.approx({2: 0.3 + 0.4, 1: 0.6, 3: 0.1})


@pytest.mark.parametrize("useless", [[(5, 0.0), (6, 0.0)], [(5, -1.0)]])
def test_score_fusion_leaves_out_a_ranking_without_a_positive_score(useless: list[tuple[int, float]]) -> None:
    assert fuse_scores([[(1, 2.0)], useless], [0.5, 0.5]) == [(1, 0.5)]


def test_support_raises_a_chunk_by_the_others_of_its_document() -> None:
    # document 10: .5 and .4; decay .5: .5 + .5 * .4 = .7 and .4 + .5 * .5 = .65; document 20: .6 alone
    raised = with_support([(1, 0.6), (2, 0.5), (3, 0.4)], {1: 20, 2: 10, 3: 10}, 0.5)
    assert [chunk for chunk, _ in raised] == [2, 3, 1]
    assert dict(raised) == pytest.approx({2: 0.7, 3: 0.65, 1: 0.6})


def test_support_of_many_chunks_falls_off_geometrically() -> None:
    # three others of .4 each: .4 * (.5 + .25 + .125) = .35
    raised = with_support([(n, 0.4) for n in range(4)], dict.fromkeys(range(4), 10), 0.5)
    assert dict(raised) == pytest.approx(dict.fromkeys(range(4), 0.75))
    assert [chunk for chunk, _ in raised] == [0, 1, 2, 3]


def test_support_of_zero_changes_nothing_and_drops_what_is_gone() -> None:
    assert with_support([(1, 0.6), (2, 0.5)], {1: 10, 2: 10}, 0.0) == [(1, 0.6), (2, 0.5)]
    assert with_support([(1, 0.6), (2, 0.5)], {2: 10}, 0.5) == [(2, 0.5)]
    assert with_support([], {}, 0.5) == []


# -- what a cut ranking does not show --------------------------------------------------------------------------------


def test_what_a_cut_ranking_misses_counts_as_its_last() -> None:
    """Hand count: 3 is missing from the first, which was cut at two: .4 / .8 = .5 of its weight .5, and 1 has it all.

    2 stands in both: .5 * .5 + .5 * .25; 1 is missing from the second, not cut: nothing.
    """
    first, second = [(1, 0.8), (2, 0.4)], [(3, 8.0), (2, 2.0)]
    fused = dict(fuse_scores([first, second[:1] + second[1:]], [0.5, 0.5], cut=3))
    assert fused == pytest.approx({1: 0.5, 2: 0.25 + 0.125, 3: 0.5})
    fused = dict(fuse_scores([first, second], [0.5, 0.5], cut=2))
    assert fused == pytest.approx({1: 0.5 + 0.125, 2: 0.25 + 0.125, 3: 0.25 + 0.5})


def test_a_cut_ranking_that_ends_below_zero_gives_nothing_to_what_it_misses() -> None:
    fused = dict(fuse_scores([[(1, 0.5), (2, -0.2)], [(3, 1.0)]], [0.5, 0.5], cut=2))
    assert fused[3] == pytest.approx(0.5)


def test_fusion_with_a_cut_is_that_without_where_no_ranking_reaches_it() -> None:
    rankings = [[(1, 3.0), (2, 1.0)], [(2, 0.9)]]
    assert fuse_scores(rankings, [0.3, 0.7], cut=3) == fuse_scores(rankings, [0.3, 0.7])


def test_scores_above_the_last_one() -> None:
    assert dict(above_last([(1, 0.9), (2, 0.8), (3, 0.7)])) == pytest.approx({1: 0.2, 2: 0.1, 3: 0.0})
    assert above_last([(1, 0.9)]) == [(1, 0.9)]  # alone it stands out by itself
    assert above_last([]) == []


def test_what_all_cosines_share_does_not_weigh() -> None:
    """Cosines of .90 to .88 rank as .3 to .1 do: by hand, the middle one keeps half of what the first has."""
    for dense in ([(1, 0.90), (2, 0.89), (3, 0.88)], [(1, 0.3), (2, 0.2), (3, 0.1)]):
        fused = dict(fuse_scores([[(9, 4.0)], above_last(dense)], [0.5, 0.5]))
        assert fused == pytest.approx({9: 0.5, 1: 0.5, 2: 0.25, 3: 0.0}, abs=1e-6)


# -- variety ---------------------------------------------------------------------------------------------------------


def unit(*values: float) -> np.ndarray:  # type: ignore[type-arg]
    vector = np.array(values, np.float32)
    return vector / np.linalg.norm(vector)


def test_variety_chooses_as_langchains_maximal_marginal_relevance() -> None:
    """Scores that are cosines to the question give what langchain-core 1.x gives, whose scores are those cosines."""
    random = np.random.default_rng(5)
    for _ in range(20):
        query = unit(1, *np.zeros(7))  # the best cosine is made 1, so that dividing by the best changes nothing
        vectors = {0: query, **{n: unit(*random.normal(size=8)) for n in range(1, 12)}}
        ranking = in_order({n: float(vector @ query) for n, vector in vectors.items()})
        order = [n for n, _ in ranking]
        for weight in (0.2, 0.5, 0.9):
            expected = maximal_marginal_relevance(query, [vectors[n] for n in order], lambda_mult=weight, k=6)
            chosen = [n for n, _ in diversify(ranking, vectors, weight, 6)]
            assert chosen[0] == 0
            # theirs lets a negative cosine to a chosen one count as a gain, ours as none: equal as long as none is
            if all(vectors[a] @ vectors[b] >= 0 for a in chosen for b in chosen):
                assert chosen == [order[place] for place in expected]


def test_variety_puts_a_copy_behind_what_is_new() -> None:
    vectors = {1: unit(1, 0), 2: unit(1, 0), 3: unit(0, 1)}
    ranking = [(1, 1.0), (2, 0.99), (3, 0.5)]
    assert [n for n, _ in diversify(ranking, vectors, 0.5, 3)] == [1, 3, 2]
    assert diversify(ranking, vectors, 1.0, 3) == ranking
    assert diversify(ranking, vectors, 0.5, 2) == [(1, 1.0), (3, 0.5)]


def test_variety_takes_chunks_without_vectors_and_nothing() -> None:
    assert diversify([], {}, 0.5, 3) == []
    assert diversify([(1, 0.0), (2, 0.0)], {}, 0.5, 5) == [(1, 0.0), (2, 0.0)]
