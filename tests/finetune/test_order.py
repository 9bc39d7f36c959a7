"""The order of an epoch."""

from __future__ import annotations

from finetune.order import epoch_order, seeded


def test_an_epoch_has_each_row_once_and_its_own_order() -> None:
    first, second = (epoch_order(50, seed=3, epoch=epoch) for epoch in (0, 1))
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert first == epoch_order(50, seed=3, epoch=0)


def test_the_steps_of_an_epoch_share_its_order() -> None:
    assert epoch_order(50, seed=3, epoch=0) is epoch_order(50, seed=3, epoch=0)


def test_near_numbers_give_unrelated_seeds() -> None:
    seeds = [seeded(1, number) for number in range(100)]
    assert len(set(seeds)) == 100
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert len({seed >> 56 for seed in seeds}) > 40  # of 128 leading parts, 100 draws hit about 69
