"""Freed memory stays while it is asked to, and goes afterwards."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import numpy as np
import pytest

from finetune.heap import kept_heap

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the C library of Linux")

_BLOCKS, _BLOCK = 128, 1 << 20  # of a megabyte each


def take_and_free() -> int:
    """Page faults of filling the blocks once."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [np.ones(_BLOCK, np.uint8) for _ in range(_BLOCKS)]
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * resource.getpagesize()


def test_freed_memory_is_used_again_without_a_page_fault_and_given_back_in_the_end() -> None:
    pages = _BLOCKS * _BLOCK // resource.getpagesize()
    with kept_heap():
        take_and_free()
        assert take_and_free() < pages / 20
        kept = resident()
    assert kept - resident() > _BLOCKS * _BLOCK / 2
