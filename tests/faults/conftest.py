"""Fixtures of the fault tests."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for `workshop`, which is also a script

from trials import Trial
from workshop import Nursery


@pytest.fixture(autouse=True)
def quick_checks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hundreds of checks in seconds.

    They compare all ids and offsets as ever, but search for fewer chunks; and FAISS's threads, which wait for each
    other by spinning, take milliseconds a search on a busy machine.
    """
    import faiss

    monkeypatch.setattr("chains.checks._SAMPLE", 20)
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(threads)


@pytest.fixture
def quick_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: a killed process loses no more there, and fsync costs nothing."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="ragproj-", dir=memory) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """The process whose forks are killed."""
    made = Nursery()
    yield made
    made.close()


@pytest.fixture
def trial(quick_folder: Path, nursery: Nursery) -> Trial:
    """An operation to be killed, in a folder of its own."""
    return Trial(quick_folder, nursery)
