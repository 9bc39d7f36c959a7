"""The shuffle on disk: everything comes back, in an order that the seed alone decides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune.data.shuffling import ShuffledRecords


def shuffled(folder: Path, count: int, *, seed: int = 0, expected_bytes: int = 0) -> list[dict[str, Any]]:
    with ShuffledRecords(folder, seed=seed, expected_bytes=expected_bytes) as records:
        for number in range(count):
            records.add({"n": number, "text": "行\u2028尾\n"})
        assert len(records) == count
        return list(records.read())


def test_every_record_comes_back_once(tmp_path: Path) -> None:
    found = shuffled(tmp_path, 500)
    assert sorted(record["n"] for record in found) == list(range(500))
    assert {record["text"] for record in found} == {"行\u2028尾\n"}
    assert list(tmp_path.iterdir()) == []


def test_the_order_is_the_seeds_and_not_the_buckets(tmp_path: Path) -> None:
    one_bucket = shuffled(tmp_path / "a", 300)
    many = shuffled(tmp_path / "b", 300, expected_bytes=10**9)
    assert one_bucket == many
    assert shuffled(tmp_path / "c", 300, seed=1) != one_bucket


@pytest.mark.parametrize("seed", range(3))
def test_the_order_has_nothing_of_the_old_one(tmp_path: Path, seed: int) -> None:
    numbers = [record["n"] for record in shuffled(tmp_path, 1000, seed=seed)]
    mean = sum(numbers[:200]) / 200
    assert 400 < mean < 600  # uniform: 499.5, with a standard error of 20


def test_nothing_in_nothing_out(tmp_path: Path) -> None:
    assert shuffled(tmp_path, 0) == []
