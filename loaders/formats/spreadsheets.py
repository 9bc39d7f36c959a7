"""Workbooks (xlsx, xlsm, xlsb, xls, ods) and delimited text (csv, tsv)."""

from __future__ import annotations

import csv
import datetime
import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loaders.formats import problems
from loaders.formats.blocks import Block, Content
from loaders.formats.containers import expect, open_zip, read_text
from loaders.formats.tables import spread_header, table_blocks

_MAIN_PARTS = {".ods": "content.xml"}
_DELIMITERS = ",;\t|"
_SNIFFED_ROWS = 50


def read_workbook(path: Path) -> Content:
    """One table per visible sheet."""
    if path.suffix.lower() == ".xls":
        expect(path, "OLE", "ZIP")  # old programs write either
    else:
        open_zip(path, main_part=_MAIN_PARTS.get(path.suffix.lower(), "xl/")).close()
    return Content(_sheet_blocks(path))


def read_delimited(path: Path) -> Content:
    """One table; the delimiter is the one that cuts the first rows most evenly."""
    text = read_text(path).replace("\0", "")
    csv.field_size_limit(1 << 30)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(text))
    return Content(table_blocks(rows))


def _sheet_blocks(path: Path) -> Iterator[Block]:
    import python_calamine as calamine

    try:
        workbook = calamine.CalamineWorkbook.from_path(str(path))
    except calamine.PasswordError:
        raise problems.encrypted(path) from None
    except calamine.CalamineError as error:
        raise problems.damaged(path, str(error)) from None
    shown = [sheet.name for sheet in workbook.sheets_metadata if sheet.visible == calamine.SheetVisibleEnum.Visible]
    for name in shown or workbook.sheet_names:
        try:
            sheet = workbook.get_sheet_by_name(name)
            rows = sheet.to_python(skip_empty_area=False)
        except calamine.CalamineError as error:
            raise problems.damaged(path, f"{name}: {error}") from None
        cells = [[_shown(cell) for cell in row] for row in rows]
        merges = sheet.merged_cell_ranges or []
        header_rows = spread_header(cells, merges)
        yield from table_blocks(cells, place={"sheet": name}, header_rows=header_rows)


def _shown(cell: Any) -> str:
    """The cell as a reader of the sheet would write it."""
    if isinstance(cell, bool):
        return "TRUE" if cell else "FALSE"
    if isinstance(cell, float):
        return str(int(cell)) if cell.is_integer() and abs(cell) < 1e15 else f"{cell:.12g}"
    if isinstance(cell, datetime.datetime):
        return str(cell.date()) if cell.time() == datetime.time() else cell.isoformat(" ", "seconds")
    return str(cell).strip()


def _delimiter(text: str) -> str:
    """The delimiter with the most columns that nearly every one of the first rows agrees on; "," when none does."""

    def evenness(delimiter: str) -> tuple[float, int]:
        sample = io.StringIO(text[: 1 << 18], newline="")
        widths = [len(row) for row in itertools.islice(csv.reader(sample, delimiter=delimiter), _SNIFFED_ROWS) if row]
        usual = max(set(widths), key=widths.count, default=1)
        agreeing = widths.count(usual) / max(len(widths), 1)
        return (agreeing, usual) if usual > 1 else (0.0, 1)

    return max(_DELIMITERS, key=evenness)
