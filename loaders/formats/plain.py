"""Plain text files."""

from __future__ import annotations

from pathlib import Path

from loaders.formats.blocks import Block, Content
from loaders.formats.containers import read_text


def read_plain(path: Path) -> Content:
    """The file as one block."""
    return Content([Block(read_text(path))])
