"""Chunk ids as runs of consecutive ones: how the list of changes keeps them, since a source's chunks mostly are."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt


def to_runs(ids: Iterable[int]) -> bytes:
    """Ids as the runs of consecutive ones they consist of, as a blob."""
    listed = sorted(set(ids))
    if not listed:
        return b""
    ordered = np.array(listed, np.int64)
    ends = np.flatnonzero(np.diff(ordered) > 1)
    firsts, lasts = ordered[np.r_[0, ends + 1]], ordered[np.r_[ends, len(ordered) - 1]]
    return np.stack([firsts, lasts], axis=1).tobytes()


def from_runs(blob: bytes) -> npt.NDArray[np.int64]:
    """The ids of a blob that `to_runs` made, ascending."""
    runs = np.frombuffer(blob, np.int64).reshape(-1, 2)
    return np.concatenate([np.zeros(0, np.int64), *(np.arange(first, last + 1) for first, last in runs)])


def count_of_runs(blob: bytes) -> int:
    """How many ids a blob that `to_runs` made stands for."""
    runs = np.frombuffer(blob, np.int64).reshape(-1, 2)
    return int((runs[:, 1] - runs[:, 0] + 1).sum())
