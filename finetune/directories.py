"""Directories that are either whole or not there."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replaced(target: Path) -> Iterator[Path]:
    """An empty directory to write into, that takes the place of `target` when all went well.

    What a killed process left half-written there is removed first; when writing fails, `target` stays as it was.
    """
    temporary = target.with_name(f".{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary)
        raise
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
