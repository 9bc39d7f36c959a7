"""In which order rows are trained on: a function of seed and epoch alone, so that a resumed run repeats nothing."""

from __future__ import annotations

import functools
import hashlib
import random


def seeded(*parts: int) -> int:
    """A seed of 63 bits out of several numbers; near numbers give unrelated seeds."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


@functools.lru_cache(maxsize=2)  # every step asks, and a million rows take most of a second
def epoch_order(rows: int, *, seed: int, epoch: int) -> tuple[int, ...]:
    """Row numbers in the order of an epoch, each once."""
    order = list(range(rows))
    random.Random(seeded(seed, epoch)).shuffle(order)  # noqa: S311 a sample, no secret
    return tuple(order)
