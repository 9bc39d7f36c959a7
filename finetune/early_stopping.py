"""Which evaluation of a run was the best, and whether it is time to stop."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


class EarlyStopping:
    """Keeps the best score of a run; a score counts as better only above the best by more than `min_gain`."""

    def __init__(self, patience: int | None, *, min_gain: float = 0.0) -> None:
        """A fresh record.

        Args:
            patience: evaluations in a row without a new best before the run should stop; None never stops.
            min_gain: what a score must exceed the best by.
        """
        self.patience = patience
        self.min_gain = min_gain
        self.history: list[tuple[int, float]] = []
        """(step, score) of every evaluation, in order"""
        self.best_step: int | None = None
        self.best = -math.inf

    def update(self, step: int, score: float) -> bool:
        """Take in the score of a step; whether it is the best so far. A score that is not a number never is."""
        self.history.append((step, score))
        if score > self.best + (self.min_gain if self.best_step is not None else 0.0):
            self.best, self.best_step = score, step
            return True
        return False

    @property
    def should_stop(self) -> bool:
        """Whether the last `patience` evaluations brought no new best. The one before the first step does not count."""
        if self.patience is None:
            return False
        since = [step for step, _ in self.history if step > 0 and (self.best_step is None or step > self.best_step)]
        return len(since) >= self.patience

    def state(self) -> dict[str, Any]:
        """What `restore` needs, as plain JSON values."""
        return {"history": self.history}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self.history, self.best_step, self.best = [], None, -math.inf
        for step, score in state["history"]:
            self.update(int(step), float(score))
