"""Which mixture of fine-tuned and base weights is taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from finetune.blend import SHARES, best, sweep
from finetune.gate import GateConfig

BEFORE = {"dev": [0.0] * 50 + [1.0] * 50, "news": [1.0] * 90 + [0.0] * 10}


def values(share: float) -> Mapping[str, Sequence[float]]:
    """The more of the fine-tuned weights, the better on dev and the worse on news: by hand, in questions of 100."""
    gained, lost = round(40 * share), {0.8: 20, 0.6: 1, 0.4: 0, 0.2: 0}[share]
    return {"dev": [0.0] * (50 - gained) + [1.0] * (50 + gained), "news": [1.0] * (90 - lost) + [0.0] * (10 + lost)}


def test_every_share_is_tried_and_the_best_on_dev_that_forgets_little_is_taken() -> None:
    tried = sweep(values, BEFORE, GateConfig(), metric="ndcg@10")
    assert tuple(mixture.share for mixture in tried) == SHARES
    assert [mixture.verdict.promoted for mixture in tried] == [False, True, True, True]
    chosen = best(tried)
    assert chosen is not None
    assert chosen.share == 0.6
    assert chosen.dev == pytest.approx(0.74)  # 50 + 24 of 100


def test_none_is_taken_where_none_passes() -> None:
    tried = sweep(lambda _: BEFORE, BEFORE, GateConfig(), metric="ndcg@10")
    assert best(tried) is None
