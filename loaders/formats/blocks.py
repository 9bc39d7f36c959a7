"""Blocks of a document in reading order, and the text and marks they make together."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from loaders.text import normalise

_MARKUP = re.compile(r"!?\[([^\]\[]*)\]\([^()]*\)|[*`]+|(?<!\w)_+|_+(?!\w)")
_MAX_HEADING_CHARS = 200  # longer "headings" are paragraphs that got the wrong style
_JUNK_TITLE = re.compile(
    r"\s*(microsoft (word|powerpoint|excel)|untitled|无标题|未命名|powerpoint|slide ?\d|幻灯片 ?\d|文档 ?\d|新建)"
    r"|.*\.(docx?|pptx?|xlsx?|wps|indd|tex|dvi|pdf|ps|fm|cdr|ai)\s*$|\W*\w?\W*$",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Block:
    """A piece of a document: a heading, a table or anything else that stands by itself."""

    text: str
    """As found; normalised when the blocks are put together. For a table its body rows, as Markdown."""
    level: int = 0
    """1 to 6 for a heading (`text` then has no `#`), 0 otherwise."""
    header: str = ""
    """The Markdown header of the table whose rows are `text`."""
    continues: bool = False
    """The text goes on in the middle of the sentence that the block before it ends with."""
    place: Mapping[str, int | str] = field(default_factory=dict)
    """page, slide or sheet."""


class Content(NamedTuple):
    """What a reader found in one file."""

    blocks: Iterable[Block]
    titles: tuple[str | None, ...] = ()
    """What the file calls itself, best first; the first that says something becomes the title."""


class Parsed(NamedTuple):
    """One document: its normalised text and its metadata (source, title, format, marks ...)."""

    text: str
    metadata: dict[str, Any]


def assemble(blocks: Iterable[Block]) -> tuple[str, list[dict[str, Any]]]:
    """The normalised text of a document and its marks, each the complete state from its `start` on.

    Headings are written the Markdown way, blocks stand a blank line apart.
    """
    parts: list[str] = []
    marks: list[dict[str, Any]] = []
    path: list[tuple[int, str]] = []
    length = 0
    for block in blocks:
        text, header = normalise(block.text), normalise(block.header)
        if not text and not header:
            continue
        if block.level > 0 and "\n" not in text and len(text) <= _MAX_HEADING_CHARS:
            path = [(level, title) for level, title in path if level < block.level]
            path.append((block.level, plain_heading(text)))
            text = "#" * block.level + " " + text
        gap = "" if not parts else _glue(parts[-1], text) if block.continues else "\n\n"
        state = {**block.place, **({"headings": [title for _, title in path]} if path else {})}
        _mark(marks, length + len(gap), state)
        if header:
            _mark(marks, length + len(gap) + len(header), {**state, "table_header": header})
            text = f"{header}\n{text}" if text else header
        parts += [gap, text]
        length += len(gap) + len(text)
    return "".join(parts), marks


def plain_heading(text: str) -> str:
    """The heading without Markdown emphasis, code marks and link targets."""
    return _MARKUP.sub(lambda found: found.group(1) or "", text).strip()


def choose_title(candidates: Iterable[str | None], stem: str) -> str:
    """The first candidate that is more than what an office program fills in by itself, else the file's name."""
    for candidate in candidates:
        title = " ".join(plain_heading(normalise(candidate or "")).split())
        if title and len(title) <= _MAX_HEADING_CHARS and not _JUNK_TITLE.match(title):
            return title
    return " ".join(normalise(stem).split()) or "?"


def _mark(marks: list[dict[str, Any]], start: int, state: dict[str, Any]) -> None:
    """Append the state unless nothing changed; a state that no character is in is overwritten."""
    if marks and marks[-1]["start"] == start:
        marks.pop()
    if not marks or {key: value for key, value in marks[-1].items() if key != "start"} != state:
        marks.append({"start": start, **state})


def _glue(before: str, after: str) -> str:
    """A space between Latin words, nothing beside Chinese."""
    return " " if before[-1:].isascii() and after[:1].isascii() else ""
