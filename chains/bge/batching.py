"""Batches of texts of like length: little padding, and a size that suits caches and memory."""

from __future__ import annotations

from collections.abc import Sequence


def length_sorted_batches(lengths: Sequence[int], token_budget: int, max_rows: int) -> list[list[int]]:
    """Indices in batches, the longest texts first (memory peaks at once, not at the end); ties keep their order.

    Args:
        lengths: tokens of each text.
        token_budget: most tokens of a batch, padding included; one text may exceed it alone.
        max_rows: most texts of a batch.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    batches: list[list[int]] = []
    for index in order:
        rows = len(batches[-1]) + 1 if batches else 0
        # the first of a batch is its longest
        if not batches or rows > max_rows or rows * lengths[batches[-1][0]] > token_budget:
            batches.append([])
        batches[-1].append(index)
    return batches
