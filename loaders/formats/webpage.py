"""HTML: headings, paragraphs, lists and tables, without scripts and navigation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from loaders import encodings
from loaders.formats.blocks import Block, Content
from loaders.formats.containers import expect
from loaders.formats.tables import clean_cell, table_blocks

_DROPPED = {
    "head", "script", "style", "noscript", "template", "nav", "footer", "iframe", "object", "svg", "canvas", "audio",
    "video", "button", "select", "input", "textarea", "datalist", "dialog", "map",
}  # fmt: skip
_INLINE = {
    "a", "abbr", "acronym", "b", "bdi", "bdo", "big", "cite", "code", "data", "del", "dfn", "em", "font", "i", "img",
    "ins", "kbd", "label", "mark", "math", "q", "ruby", "rb", "s", "samp", "small", "span", "strike", "strong", "sub",
    "sup", "time", "tt", "u", "var", "wbr",
}  # fmt: skip
_HIDDEN = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden", re.IGNORECASE)
_DECLARED = re.compile(rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?\s*([\w.:-]{1,40})", re.IGNORECASE)
_XML_DECLARED = re.compile(rb"<\?xml[^>]{0,200}?encoding\s*=\s*[\"']([\w.:-]{1,40})", re.IGNORECASE)
_MAX_SPAN = 100  # colspan="99999" is a typing error or an attack


def read_html(path: Path) -> Content:
    """The page as blocks; the charset it declares is believed when it decodes."""
    expect(path, "text")
    text, _ = encodings.decode(data := path.read_bytes(), declared=_declared(data))
    blocks, title = html_blocks(text)
    heading = next((block.text for block in blocks if block.level), None)
    return Content(blocks, (title, heading))


def html_blocks(text: str) -> tuple[list[Block], str | None]:
    """(blocks of the body, text of `<title>`); a page that is nothing but navigation keeps it."""
    root = _parse(text)
    if root is None:
        return [], None
    title = root.findtext(".//title")
    walker = _Walker(skipped=_DROPPED)
    walker.walk(root)
    if not walker.blocks:
        walker = _Walker(skipped=_DROPPED - {"nav", "footer"})
        walker.walk(root)
    return walker.blocks, title


def _declared(data: bytes) -> str | None:
    head = data[:4096]
    found = _DECLARED.search(head) or _XML_DECLARED.search(head)
    name = found.group(1).decode("ascii") if found else None
    return None if name and name.lower().startswith("utf-16") else name  # a page that can be searched so is not


def _parse(text: str) -> Any:
    import lxml.etree
    import lxml.html

    # bytes with a named encoding: text with an XML declaration of its own is refused by lxml
    parser = lxml.html.HTMLParser(encoding="utf-8", no_network=True, remove_comments=True, remove_pis=True)
    data = text.replace("\0", "").encode("utf-8", errors="replace")
    if not data.strip():
        return None
    try:
        return lxml.html.document_fromstring(data, parser=parser)
    except lxml.etree.ParserError:  # "Document is empty": only comments or broken tags
        return None


class _Walker:
    """Turns an element tree into blocks, in document order, without recursion over plain nesting."""

    def __init__(self, *, skipped: set[str]) -> None:
        self.blocks: list[Block] = []
        self._skipped = skipped
        self._inline: list[str] = []
        self._items: list[str] = []  # list items that are not yet a block

    def walk(self, root: Any) -> None:
        """Append the blocks of everything below `root`."""
        stack: list[tuple[Any, bool]] = [(root, False)]
        while stack:
            element, leaving = stack.pop()
            if leaving:
                self._leave(element)
                self._inline.append(element.tail or "")
            elif not isinstance(element.tag, str) or self._is_skipped(element):
                self._inline.append(element.tail or "")
            elif element.tag == "table" and not _is_layout(element):
                self._table(element)
                self._inline.append(element.tail or "")
            else:
                self._enter(element)
                stack.append((element, True))
                stack.extend((child, False) for child in reversed(element))
        self._flush()
        self._flush_items()

    def _is_skipped(self, element: Any) -> bool:
        if element.tag in self._skipped or element.get("role") == "navigation" or "hidden" in element.attrib:
            return True
        return bool(_HIDDEN.search(element.get("style") or ""))

    def _enter(self, element: Any) -> None:
        if element.tag == "br":
            self._inline.append("\v")  # a line break that survives the collapsing of white space
        elif element.tag not in _INLINE:
            self._flush()
        if element.tag == "img" and (alt := element.get("alt")):
            self._inline.append(alt)
        text = element.text or ""
        self._inline.append(text.replace("\n", "\v").replace(" ", "\xa0") if _is_preformatted(element) else text)

    def _leave(self, element: Any) -> None:
        if element.tag in _INLINE or element.tag == "br":
            return
        level = int(element.tag[1]) if re.fullmatch("h[1-6]", element.tag) else 0
        self._flush(level=level, item=_bullet(element))

    def _flush(self, *, level: int = 0, item: str = "") -> None:
        """End the running paragraph; the items of a list stay together in one block."""
        text = _collapse("".join(self._inline))
        self._inline.clear()
        if not text:
            return
        if item:
            self._items.append(item + text)
            return
        self._flush_items()
        self.blocks.append(Block(text.replace("\n", " ") if level else text, level=level))

    def _flush_items(self) -> None:
        if self._items:
            self.blocks.append(Block("\n".join(self._items)))
            self._items.clear()

    def _table(self, table: Any) -> None:
        self._flush()
        self._flush_items()
        caption = table.find("caption")
        if caption is not None:
            self.blocks.append(Block(_collapse(caption.text_content())))
        rows, header_rows = _grid(table)
        self.blocks.extend(table_blocks(rows, header_rows=header_rows))


def _bullet(element: Any) -> str:
    """What a list item begins with, "" for other elements; text after a nested list is an item's as well."""
    if element.tag != "li":
        return ""
    parent = element.getparent()
    if parent is None or parent.tag != "ol":
        return "- "
    position = sum(1 for _ in element.itersiblings("li", preceding=True)) + 1 if len(parent) < 1000 else 1
    return f"{position}. "


def _is_layout(table: Any) -> bool:
    """Whether the table only arranges the page: it holds other tables, or a single cell."""
    cells = table.iter("td", "th")
    return next(table.iterdescendants("table"), None) is not None or (
        next(cells, None) is not None and next(cells, None) is None
    )


def _is_preformatted(element: Any) -> bool:
    return element.tag == "pre" or (element.tag in _INLINE and next(element.iterancestors("pre"), None) is not None)


def _collapse(text: str) -> str:
    """White space as a browser shows it: one space for any run, `\\v` a line break, `\\xa0` a fixed space."""
    lines = [re.sub(r"[ \t\n\r\f]+", " ", line).strip(" ") for line in text.split("\v")]
    return "\n".join(lines).strip().replace("\xa0", " ")


def _grid(table: Any) -> tuple[list[list[str]], int]:
    """(cells by row, number of header rows); a header cell is repeated over the columns and rows it spans."""
    rows: list[list[str]] = []
    pending: dict[tuple[int, int], str] = {}  # cells that a span from above or the left fills
    header_rows = 0
    for y, row in enumerate(table.iter("tr")):
        cells: list[str] = []
        elements = [cell for cell in row if cell.tag in ("td", "th")]
        if elements and y == header_rows and all(cell.tag == "th" for cell in elements):
            header_rows += 1
        for cell in elements:
            while (y, len(cells)) in pending:
                cells.append(pending.pop((y, len(cells))))
            text = clean_cell(_collapse(_cell_text(cell))).replace("\\|", "|")
            across, down = _span(cell, "colspan"), _span(cell, "rowspan")
            repeated = text if cell.tag == "th" or y == 0 else ""
            for dy in range(1, down):
                for dx in range(across):
                    pending[y + dy, len(cells) + dx] = repeated
            cells += [text] + [repeated] * (across - 1)
        while (y, len(cells)) in pending:
            cells.append(pending.pop((y, len(cells))))
        rows.append(cells)
    return rows, max(1, header_rows)


def _cell_text(cell: Any) -> str:
    """The text of a cell with a space where a block inside it ends."""
    parts = [cell.text or ""]
    for element in cell.iterdescendants():
        if isinstance(element.tag, str) and element.tag not in ("script", "style"):
            parts += ["" if element.tag in _INLINE else " ", element.text or ""]
        parts.append(element.tail or "")
    return "".join(parts)


def _span(cell: Any, attribute: str) -> int:
    value = cell.get(attribute) or "1"
    return min(max(int(value), 1), _MAX_SPAN) if value.isascii() and value.isdecimal() and len(value) < 6 else 1
