"""PowerPoint: titles, text, tables, diagrams and speaker notes, slide by slide."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from loaders.formats.blocks import Block, Content
from loaders.formats.containers import open_zip
from loaders.formats.tables import table_blocks

_A = "{http://schemas.openxmlformats.org/drawingml/2006/main}"
_R = "{http://schemas.openxmlformats.org/officeDocument/2006/relationships}"
_DIAGRAM = "{http://schemas.openxmlformats.org/drawingml/2006/diagram}relIds"


def read_pptx(path: Path) -> Content:
    """The slides in order, each with its title as heading and its notes at the end."""
    import pptx

    open_zip(path, main_part="ppt/").close()
    presentation = pptx.Presentation(str(path))
    blocks = [block for number, slide in enumerate(presentation.slides, start=1) for block in _slide(slide, number)]
    heading = next((block.text for block in blocks if block.level), None)
    return Content(blocks, (presentation.core_properties.title, heading))


def _slide(slide: Any, number: int) -> Iterator[Block]:
    place = {"slide": number}
    title = slide.shapes.title
    text = " ".join(title.text_frame.text.split()) if title is not None else ""
    # a slide without title ends the section of the one before it all the same: place says so, headings cannot
    if text:
        yield Block(text, level=1, place=place)
    for shape in _in_reading_order(_flatten(slide.shapes)):
        if title is None or shape.shape_id != title.shape_id:
            yield from _shape(shape, place)
    if slide.has_notes_slide and (frame := slide.notes_slide.notes_text_frame) is not None and frame.text.strip():
        yield Block(f"备注：{frame.text.strip()}", place=place)


def _flatten(shapes: Iterable[Any]) -> Iterator[Any]:
    for shape in shapes:
        if shape.element.tag.endswith("}grpSp"):
            yield from _flatten(shape.shapes)
        else:
            yield shape


def _in_reading_order(shapes: Iterable[Any]) -> list[Any]:
    """Top to bottom, and left to right where tops are within a few millimetres of each other.

    Shapes inside groups have coordinates of their group and shapes without any come first, as pptx writes them.
    """
    band = 300_000  # EMU, about 8 mm
    return sorted(shapes, key=lambda shape: ((shape.top or 0) // band, shape.left or 0))


def _shape(shape: Any, place: Mapping[str, int | str]) -> Iterator[Block]:
    if getattr(shape, "has_table", False) and shape.has_table:
        yield from table_blocks(_grid(shape.table), place=place)
    elif getattr(shape, "has_chart", False) and shape.has_chart:
        yield from _chart(shape.chart, place)
    elif shape.has_text_frame:
        yield Block(_paragraphs(shape.text_frame._txBody), place=place)
    elif (relation := next(shape.element.iter(_DIAGRAM), None)) is not None:
        part = shape.part.related_part(relation.get(f"{_R}dm"))
        yield Block(_paragraphs(_parse(part.blob)), place=place)


def _paragraphs(body: Any) -> str:
    lines = []
    for paragraph in body.iter(f"{_A}p"):
        pieces = ("\n" if node.tag == f"{_A}br" else node.text or "" for node in paragraph.iter(f"{_A}t", f"{_A}br"))
        lines.append("".join(pieces))
    return "\n".join(line for line in lines if line.strip())


def _grid(table: Any) -> list[list[str]]:
    """Cells by row; those a merged cell covers are empty, except in the first row, where it is repeated."""
    rows: list[list[str]] = []
    for row in table.rows:
        cells: list[str] = []
        for cell in row.cells:
            repeat = not rows and cells and cell._tc.get("hMerge")
            cells.append(cells[-1] if repeat else "" if cell.is_spanned else _paragraphs(cell._tc))
        rows.append(cells)
    return rows


def _chart(chart: Any, place: Mapping[str, int | str]) -> Iterator[Block]:
    """The numbers behind a chart, one row per category."""
    if chart.has_title and chart.chart_title.has_text_frame:
        yield Block(chart.chart_title.text_frame.text, place=place)
    for plot in chart.plots:
        series = list(plot.series)
        rows = [["", *(each.name or "" for each in series)]]
        for index, category in enumerate(plot.categories):
            values = (each.values[index] if index < len(each.values) else None for each in series)
            rows.append([str(category), *("" if value is None else f"{value:g}" for value in values)])
        yield from table_blocks(rows, place=place)


def _parse(data: bytes) -> Any:
    import lxml.etree

    return lxml.etree.fromstring(data, lxml.etree.XMLParser(resolve_entities=False, no_network=True))
