"""Word documents: paragraphs with their heading level and number, tables, text boxes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loaders.formats.blocks import Block, Content
from loaders.formats.containers import open_zip
from loaders.formats.numbering import Numbering
from loaders.formats.tables import table_blocks

_W = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"
_M = "{http://schemas.openxmlformats.org/officeDocument/2006/math}"
_MC = "{http://schemas.openxmlformats.org/markup-compatibility/2006}"
# Deleted text, field codes, and the second copy of a text box that is kept for old programs.
_SKIPPED = {f"{_W}del", f"{_W}moveFrom", f"{_W}instrText", f"{_W}rt", f"{_MC}Fallback", f"{_W}pPr", f"{_W}rPr"}
_WRAPPERS = {f"{_W}sdt", f"{_W}sdtContent", f"{_W}customXml", f"{_W}ins", f"{_W}moveTo", f"{_MC}AlternateContent"}
_WRAPPERS.add(f"{_MC}Choice")
_MAX_LEVEL = 6


def read_docx(path: Path) -> Content:
    """The body in order; headers, footers, footnotes and comments are left out."""
    import docx

    open_zip(path, main_part="word/").close()
    document = docx.Document(str(path))
    styles = _Styles(document)
    blocks = list(_merge_items(_body_blocks(document.element.body, styles)))
    titled = next((block.text for block in blocks if block.level == 1), None)
    return Content(blocks, (styles.title_text(document), document.core_properties.title, titled))


class _Styles:
    """Heading levels and list numbers, by the styles of one document."""

    def __init__(self, document: Any) -> None:
        self._styles = {style.get(f"{_W}styleId"): style for style in document.styles.element.iter(f"{_W}style")}
        self._levels: dict[str | None, int] = {}
        part = next(
            (rel.target_part for rel in document.part.rels.values() if rel.reltype.endswith("/numbering")), None
        )
        self.numbering = Numbering(part.element if part is not None else None, self._styles)

    def level(self, paragraph: Any) -> int:
        """1 to 6 for a heading, 0 otherwise."""
        outline = paragraph.find(f"{_W}pPr/{_W}outlineLvl")
        if outline is not None:
            return _outline(outline)
        style = paragraph.find(f"{_W}pPr/{_W}pStyle")
        return self._style_level(style.get(f"{_W}val")) if style is not None else 0

    def title_text(self, document: Any) -> str | None:
        """The first paragraph in the style "Title"."""
        for paragraph in document.element.body.iter(f"{_W}p"):
            style = paragraph.find(f"{_W}pPr/{_W}pStyle")
            if style is not None and self._name(style.get(f"{_W}val")) in {"title", "标题"}:
                return _paragraph_text(paragraph)[0]
        return None

    def _name(self, style_id: str | None) -> str:
        style = self._styles.get(style_id)
        name = style.find(f"{_W}name") if style is not None else None
        return (name.get(f"{_W}val") or "").lower() if name is not None else ""

    def _style_level(self, style_id: str | None) -> int:
        if style_id not in self._levels:
            self._levels[style_id] = 0  # a style based on itself ends here
            self._levels[style_id] = self._find_level(style_id)
        return self._levels[style_id]

    def _find_level(self, style_id: str | None) -> int:
        name = self._name(style_id)
        for prefix in ("heading ", "标题 "):
            if name.startswith(prefix) and name[len(prefix) :].isdecimal():
                return min(int(name[len(prefix) :]), _MAX_LEVEL)
        if name in {"title", "标题"}:
            return 1
        style = self._styles.get(style_id)
        if style is None:
            return 0
        outline, base = style.find(f"{_W}pPr/{_W}outlineLvl"), style.find(f"{_W}basedOn")
        if outline is not None:
            return _outline(outline)
        return self._style_level(base.get(f"{_W}val")) if base is not None else 0


def _outline(element: Any) -> int:
    """Word counts from 0; 9 is body text."""
    value = element.get(f"{_W}val") or "9"
    return min(int(value) + 1, _MAX_LEVEL) if value.isdecimal() and int(value) < 9 else 0


def _body_blocks(container: Any, styles: _Styles) -> Iterator[Block]:
    for element in container:
        if element.tag == f"{_W}p":
            yield from _paragraph_blocks(element, styles)
        elif element.tag == f"{_W}tbl":
            rows, nested = _grid(element)
            yield from table_blocks(rows)
            for table in nested:
                yield from table_blocks(_grid(table)[0])
        elif element.tag in _WRAPPERS:
            yield from _body_blocks(element, styles)


def _paragraph_blocks(paragraph: Any, styles: _Styles) -> Iterator[Block]:
    text, boxes = _paragraph_text(paragraph)
    level = styles.level(paragraph)
    if text.strip():
        label = styles.numbering.label(paragraph)
        yield Block(label + (" ".join(text.split()) if level else text), level=level)
    for box in boxes:
        yield from _body_blocks(box, styles)


def _merge_items(blocks: Iterator[Block]) -> Iterator[Block]:
    """The same blocks with the bullet items that follow each other in one block."""
    items: list[str] = []
    for block in blocks:
        if block.text.startswith("- ") and not block.level and not block.header:
            items.append(block.text)
            continue
        if items:
            yield Block("\n".join(items))
            items = []
        yield block
    if items:
        yield Block("\n".join(items))


def _paragraph_text(paragraph: Any) -> tuple[str, list[Any]]:
    """(text, text boxes anchored in it)."""
    parts: list[str] = []
    boxes: list[Any] = []
    stack = list(reversed(paragraph))
    while stack:
        element = stack.pop()
        if element.tag in _SKIPPED:
            continue
        if element.tag == f"{_W}txbxContent":
            boxes.append(element)
        elif element.tag in (f"{_W}t", f"{_M}t"):
            parts.append(element.text or "")
        elif element.tag in (f"{_W}tab", f"{_W}ptab"):
            parts.append("\t")
        elif element.tag in (f"{_W}br", f"{_W}cr"):
            parts.append("\n")
        elif element.tag == f"{_W}noBreakHyphen":
            parts.append("-")
        else:
            stack.extend(reversed(element))
    return "".join(parts), boxes


def _grid(table: Any) -> tuple[list[list[str]], list[Any]]:
    """(cells by row, tables nested in them); a cell merged over columns is repeated in the first row only."""
    rows: list[list[str]] = []
    nested: list[Any] = []
    for row in _children(table, f"{_W}tr"):
        before = row.find(f"{_W}trPr/{_W}gridBefore")
        cells = [""] * (_number(before) if before is not None else 0)
        for cell in _children(row, f"{_W}tc"):
            span = cell.find(f"{_W}tcPr/{_W}gridSpan")
            merged = cell.find(f"{_W}tcPr/{_W}vMerge")
            goes_on = merged is not None and merged.get(f"{_W}val") != "restart"
            text = "" if goes_on else _cell_text(cell)
            nested += _children(cell, f"{_W}tbl")
            cells += [text] + [text if not rows else ""] * ((_number(span) if span is not None else 1) - 1)
        rows.append(cells)
    return rows, nested


def _cell_text(cell: Any) -> str:
    texts: list[str] = []
    for paragraph in _children(cell, f"{_W}p"):
        text, boxes = _paragraph_text(paragraph)
        texts += [text, *(_cell_text(box) for box in boxes)]
    return "\n".join(texts)


def _children(element: Any, tag: str) -> list[Any]:
    """Children of the tag, also those that a content control or a tracked insertion wraps."""
    found: list[Any] = []
    for child in element:
        if child.tag == tag:
            found.append(child)
        elif child.tag in _WRAPPERS:
            found += _children(child, tag)
    return found


def _number(element: Any) -> int:
    value = element.get(f"{_W}val") or "1"
    return max(1, min(int(value), 100)) if value.isdecimal() else 1
