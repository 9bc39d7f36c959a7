"""PDF: text in reading order, ruled tables, running heads left out, pages without text read by OCR."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loaders.formats import images, problems
from loaders.formats.blocks import Block, Content
from loaders.formats.containers import expect
from loaders.formats.pdf_layout import Line, PageText, in_reading_order, paragraphs
from loaders.formats.pdf_tables import Section, Table, find_tables
from loaders.formats.tables import table_blocks
from loaders.text import continues, normalise

logger = logging.getLogger(__name__)

_OCR_SCALE = 200 / 72  # 200 dpi: enough for 8-point characters
_OCR_MAX_SIDE = 4000  # pixels
_MIN_PAGE_CHARS = 8  # fewer: a page number stamped on a scan
_EDGE = 0.09  # running heads and page numbers stand in this share of the page, at the top and at the bottom
_EDGE_MEMORY = 2  # pages: left and right pages may differ
_FULL_PARAGRAPH = 40  # characters: a shorter last line of a page is a heading or a label, not an open sentence
_SAME_COLUMNS = 3.0  # points between the rulings of a table and of its continuation on the next page


def read_pdf(path: Path, *, ocr: str) -> Content:
    """The pages in order."""
    import pypdfium2

    expect(path, "PDF")
    try:
        document = pypdfium2.PdfDocument(path)
    except pypdfium2.PdfiumError as error:
        if getattr(error, "err_code", None) == pypdfium2.raw.FPDF_ERR_PASSWORD:
            raise problems.encrypted(path) from None
        raise problems.damaged(path, str(error)) from None
    return Content(_document_blocks(document, path, ocr), (_believable_title(document),))


def _believable_title(document: Any) -> str | None:
    """The title in the metadata, if the first page shows it; most are leftovers of another file."""
    title = "".join(normalise(document.get_metadata_value("Title")).split())
    first = _load_page(document, 1) if title else None
    if first is None:
        return None
    shown = "".join(normalise(first.get_textpage().get_text_range()).split())
    return document.get_metadata_value("Title") if title in shown else None


def _document_blocks(document: Any, path: Path, ocr: str) -> Iterator[Block]:
    reader = _Reader()
    found = scanned = False
    for number in range(1, len(document) + 1):
        page = _load_page(document, number)
        if page is None:
            continue
        text = PageText(page)
        if text.count < _MIN_PAGE_CHARS and _is_picture(page, text):
            scanned = True
            if ocr == "auto" and images.ocr_installed() and (recognised := _recognise(page)):
                found = True
                yield Block(recognised, place={"page": number})
                continue
        for block in reader.blocks(page, text, number):
            found = found or bool(block.text.strip())
            yield block
        page.close()
    document.close()
    if scanned and not found:
        raise problems.ocr_is_off(path) if ocr == "off" else problems.needs_ocr(path)


def _load_page(document: Any, number: int) -> Any:
    import pypdfium2

    try:
        return document[number - 1]
    except pypdfium2.PdfiumError:
        logger.warning("page %d cannot be loaded and is left out", number)
        return None


class _Reader:
    """Carries what one page needs to know of the pages before it."""

    def __init__(self) -> None:
        self._edges: list[set[str]] = []  # running heads of the last pages, newest last
        self._last = ""
        self._section: Section | None = None  # of a table, where the page before ended with one

    def blocks(self, page: Any, text: PageText, number: int) -> Iterator[Block]:
        """The blocks of the page."""
        place: dict[str, int | str] = {"page": number}
        items = self._without_running_heads(text.items(find_tables(page, text)), text)
        first = True
        lines: list[Line] = []
        for item in [*items, None]:
            if isinstance(item, Line):
                lines.append(item)
                continue
            if lines:
                yield self._paragraphs(lines, place, first=first)
                first, lines = False, []
            if item is not None:
                yield from self._table(item.sections(), place, first=first)
                first = False

    def _paragraphs(self, lines: list[Line], place: dict[str, int | str], *, first: bool) -> Block:
        texts = paragraphs(in_reading_order(lines))
        goes_on = first and len(self._last) > _FULL_PARAGRAPH and continues(self._last, texts[0])
        self._last, self._section = texts[-1], None
        return Block("\n".join(texts), place=place, continues=goes_on)

    def _table(self, sections: list[Section], place: dict[str, int | str], *, first: bool) -> Iterator[Block]:
        """The blocks of a table; one that goes on from the page before gets that table's header again."""
        before = self._section
        if first and before is not None and _same_columns(before, sections[0]):
            header = before.rows[: before.header_rows]
            repeated = sections[0].rows[: len(header)] == header
            rows = sections[0].rows if repeated else [*header, *sections[0].rows]
            sections = [Section(rows, before.header_rows, before.columns), *sections[1:]]
        for section in sections:
            yield from table_blocks(section.rows, place=place, header_rows=section.header_rows)
        self._section, self._last = sections[-1], ""

    def _without_running_heads(self, items: list[Line | Table], text: PageText) -> list[Line | Table]:
        """The items less the lines at the edge that also stood at the edge of a page before (digits aside)."""
        edges = {id(item): _mask(item.text) for item in items if isinstance(item, Line) and text.at_edge(item, _EDGE)}
        seen = set().union(*self._edges)
        self._edges = [*self._edges[1 - _EDGE_MEMORY :], set(edges.values())]
        return [item for item in items if edges.get(id(item)) not in seen]


def _mask(text: str) -> str:
    return "".join("0" if ch.isdigit() else ch for ch in text if not ch.isspace())


def _same_columns(one: Section, other: Section) -> bool:
    return len(one.columns) == len(other.columns) and all(
        abs(a - b) <= _SAME_COLUMNS for a, b in zip(one.columns, other.columns, strict=True)
    )


def _is_picture(page: Any, text: PageText) -> bool:
    """Whether the page shows an image, or without any text at least drawings, which may be outlined letters."""
    import pypdfium2.raw as raw

    kinds = [raw.FPDF_PAGEOBJ_IMAGE] if text.count else [raw.FPDF_PAGEOBJ_IMAGE, raw.FPDF_PAGEOBJ_PATH]
    return next(page.get_objects(filter=kinds, max_depth=3), None) is not None


def _recognise(page: Any) -> str:
    scale = min(_OCR_SCALE, _OCR_MAX_SIDE / max(page.get_size()))
    return images.recognise(page.render(scale=scale).to_pil())
