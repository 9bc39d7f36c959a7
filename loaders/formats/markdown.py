"""Markdown: headings and tables are found, the rest stays as written."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loaders.formats.blocks import Block, Content
from loaders.formats.containers import read_text
from loaders.text import normalise

_COMMENT = re.compile(r"\s*(?:<!--(?:(?!-->).)*-->\s*)+", re.DOTALL)
_FRONT_MATTER = re.compile(r"---\n(.*?\n)(?:---|\.\.\.)(?:\n|\Z)", re.DOTALL)
_FRONT_TITLE = re.compile(r"^title:\s*[\"']?(.+?)[\"']?\s*$", re.MULTILINE)
_UNSPACED_HEADING = re.compile(
    r"(#{1,6})(?=[\u4e00-\u9fff（【《\d])(.+)"
)  # "##标题": not CommonMark, common in Chinese
_SPACED_HEADING = re.compile(r"(#{1,6})[ \t]+(.*?)(?:[ \t]+#+)?$")


def read_markdown(path: Path) -> Content:
    """The file as blocks; front matter is left out but may give the title."""
    text = normalise(read_text(path))
    title = None
    if front := _FRONT_MATTER.match(text):
        found = _FRONT_TITLE.search(front.group(1))
        title = found.group(1) if found else None
        text = text[front.end() :]
    blocks = list(markdown_blocks(text))
    first = min((block.level for block in blocks if block.level), default=0)
    heading = next((block.text for block in blocks if block.level and block.level == first), None)
    return Content(blocks, (title, heading))


def markdown_blocks(text: str) -> Iterator[Block]:
    """Headings, tables and the text between them, in order; every line of `text` is in exactly one block."""
    lines = text.split("\n")
    done = 0
    for start, end, block in _structure(text, lines):
        if start > done:
            yield Block("\n".join(lines[done:start]))
        yield block
        done = end
    yield Block("\n".join(lines[done:]))


def _structure(text: str, lines: list[str]) -> Iterator[tuple[int, int, Block]]:
    """(first line, line after the last, block) of each heading, table and comment outside lists, quotes and code.

    A comment's block is empty: it is not part of what the document says.
    """
    for token in _parse(text):
        if token.level or not token.map:
            continue
        start, end = token.map
        if token.type == "heading_open":
            spaced = _SPACED_HEADING.match(lines[start].strip())
            title = spaced.group(2) if spaced else " ".join(lines[start : end - 1])  # else underlined with === or ---
            yield start, end, Block(title, level=int(token.tag[1]))
        elif token.type == "table_open":
            header = "\n".join(line.strip() for line in lines[start : start + 2])
            yield start, end, Block("\n".join(line.strip() for line in lines[start + 2 : end]), header=header)
        elif token.type == "html_block" and _COMMENT.fullmatch(token.content):
            yield start, end, Block("")
        elif token.type == "paragraph_open":
            for number in range(start, end):
                if heading := _UNSPACED_HEADING.match(lines[number]):
                    yield number, number + 1, Block(heading.group(2), level=len(heading.group(1)))


def _parse(text: str) -> list[Any]:
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark").enable("table")
    parser.core.ruler.enableOnly(["normalize", "block"])  # no inline markup: it is not needed and can be slow
    return parser.parse(text)
