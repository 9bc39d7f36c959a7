"""Batches of like length."""

from __future__ import annotations

import random

from chains.bge.batching import length_sorted_batches


def test_batches_are_as_counted_by_hand() -> None:
    # longest first: 9 | 5 5 (2 x 5 = 10; a third would be 15) | 3 2 1 (3 x 3 = 9)
    assert length_sorted_batches([3, 9, 5, 1, 5, 2], token_budget=12, max_rows=8) == [[1], [2, 4], [0, 5, 3]]


def test_no_batch_has_more_rows_than_allowed() -> None:
    assert length_sorted_batches([1, 1, 1, 1, 1], token_budget=100, max_rows=2) == [[0, 1], [2, 3], [4]]


def test_a_text_longer_than_the_budget_stands_alone() -> None:
    assert length_sorted_batches([50, 3], token_budget=10, max_rows=8) == [[0], [1]]


def test_no_texts_are_no_batches() -> None:
    assert length_sorted_batches([], token_budget=10, max_rows=8) == []


def test_every_text_is_in_one_batch_within_the_budget() -> None:
    generator = random.Random(0)
    lengths = [generator.randint(1, 512) for _ in range(500)]
    batches = length_sorted_batches(lengths, token_budget=1024, max_rows=32)
    assert sorted(index for batch in batches for index in batch) == list(range(500))
    assert all(len(batch) * max(lengths[i] for i in batch) <= 1024 for batch in batches)
