"""Text without its removed chunks: what leaves a stored document when some of its chunks are deleted."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence

# White space that no normalised text has (`loaders.text.normalise` makes it a plain space), as wide as what it covers.
BLANK = "\u3000"


def blank_spans(run: Callable[..., sqlite3.Cursor], content: int, spans: Sequence[tuple[int, int]]) -> None:
    """Blank the places of removed chunks in a content's text; nothing where it went with its last chunk."""
    row = run("SELECT text FROM contents WHERE id = ?", (content,)).fetchone()
    if row is not None:
        kept = run("SELECT start, end FROM chunks WHERE content_id = ?", (content,)).fetchall()
        run("UPDATE contents SET text = ? WHERE id = ?", (blanked(row[0], spans, kept), content))


def blanked(text: str, spans: Sequence[tuple[int, int]], kept: Sequence[tuple[int, int]]) -> str:
    """The text, as long as before, with `BLANK` for each character that is in one of the spans and in none kept."""
    gone = bytearray(len(text))
    for mark, places in ((b"\1", spans), (b"\0", kept)):
        for start, end in places:
            gone[start:end] = mark * len(gone[start:end])
    return "".join(BLANK if is_gone else character for character, is_gone in zip(text, gone, strict=True))
