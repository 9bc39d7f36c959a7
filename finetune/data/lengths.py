"""How long texts are in tokens, and how many of them a model would cut."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np


class Lengths:
    """Counts of tokens, four bytes for each text."""

    def __init__(self, count: Callable[[str], int], limit: int) -> None:
        """Args are what counts a text's tokens, and the most of them that the model reads."""
        self._count = count
        self._limit = limit
        self._counts = array("I")

    def add(self, texts: Iterable[str]) -> None:
        """Count some texts."""
        self._counts.extend(map(self._count, texts))

    def summary(self) -> dict[str, Any]:
        """Number of texts, p50, p95 and maximum of their tokens, and the share that is longer than the limit."""
        counts = np.asarray(self._counts)
        if not len(counts):
            return {"texts": 0, "p50": None, "p95": None, "max": None, "truncated": None}
        middle, high = np.percentile(counts, [50, 95], method="inverted_cdf")
        return {
            "texts": len(counts),
            "p50": int(middle),
            "p95": int(high),
            "max": int(counts.max()),
            "truncated": round(float((counts > self._limit).mean()), 4),
        }
