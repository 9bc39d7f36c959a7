"""How long texts are in tokens, and how many of them a model would cut."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np


class Lengths:
    """Counts of tokens, four bytes for each text."""

    def __init__(self, count: Callable[[str], int], limit: int | None = None) -> None:
        """Args are what counts a text's tokens, and the most that the model reads of one."""
        self._count = count
        self._limit = limit
        self._counts = array("I")

    def add(self, texts: Iterable[str]) -> None:
        """Count some texts."""
        self._counts.extend(map(self._count, texts))

    def summary(self) -> dict[str, Any]:
        """Number of texts, p50, p95 and maximum of their tokens, and the share above the limit where there is one."""
        counts = np.asarray(self._counts)
        if not len(counts):
            return {"texts": 0}
        middle, high = np.percentile(counts, [50, 95], method="inverted_cdf")
        summary = {"texts": len(counts), "p50": int(middle), "p95": int(high), "max": int(counts.max())}
        if self._limit is None:
            return summary
        return {**summary, "truncated": round(float((counts > self._limit).mean()), 4)}
