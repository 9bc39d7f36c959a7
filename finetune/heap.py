"""Memory that one training step frees stays with the process for the next.

A step on a CPU allocates hundreds of megabytes of activations. By itself the C library takes each block from the kernel
and gives it back, and the kernel clears every page again before it is used: a quarter of the time of a step.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# From glibc's malloc.h: parameters of mallopt.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
# What glibc's own adjustment comes to at most on 64 bits; the first is also the most that may be asked for.
_LARGEST_BLOCK, _LARGEST_TOP = 32 << 20, 64 << 20
_NEVER = (1 << 31) - 1


@contextmanager
def kept_heap() -> Iterator[None]:
    """Inside, freed memory is kept for reuse; on leaving it goes back to the system. Nothing changes without glibc."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "mallopt"):  # musl has none
        yield
        return
    libc.mallopt(_MMAP_THRESHOLD, _LARGEST_BLOCK)
    libc.mallopt(_TRIM_THRESHOLD, _NEVER)
    libc.mallopt(_ARENA_MAX, 1)  # threads to come share the one heap that is kept
    try:
        yield
    finally:
        libc.mallopt(_TRIM_THRESHOLD, _LARGEST_TOP)
        libc.mallopt(_ARENA_MAX, 0)  # as many as suit the cores
        libc.malloc_trim(0)
