"""Tables as Markdown rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from loaders.formats.blocks import Block

Row = Sequence[str]
Merge = tuple[tuple[int, int], tuple[int, int]]  # first and last cell as (row, column), from 0


def table_blocks(
    rows: Iterable[Row], *, place: Mapping[str, int | str] | None = None, header_rows: int = 1
) -> Iterator[Block]:
    """The table as blocks: caption lines that stand alone above it, then header and rows.

    Empty rows and columns are dropped, ragged rows filled up. A table of one column is plain lines; of two header rows
    each column gets both, outer first. Nothing comes out of an empty table.
    """
    place = place or {}
    kept = _without_empty_columns([[clean_cell(cell) for cell in row] for row in rows])
    if not kept:
        return
    if len(kept[0]) == 1:
        yield Block("\n".join(row[0] for row in kept), place=place)
        return
    while len(kept) > 1 and _is_caption(kept[0]):
        yield Block(next(cell for cell in kept[0] if cell), place=place)
        kept = kept[1:]
        header_rows = max(1, header_rows - 1)
    header = _merge_header(kept[:header_rows])
    body = kept[header_rows:]
    yield Block("\n".join(map(_line, body)), header=f"{_line(header)}\n{_rule(header)}", place=place)


def spread_header(cells: list[list[str]], merges: Iterable[Merge]) -> int:
    """How many rows the header has; its merged cells get their value in every column they span.

    Rows merged across the whole sheet are captions; the header ends where the merges that begin in its first row end,
    and has one more row where a cell of it spans columns. Empty rows above do not count.
    """
    merges = list(merges)
    top = next((number for number, row in enumerate(cells) if any(row)), 0)
    used = {column for row in cells for column, cell in enumerate(row) if cell}
    first = top
    while any(a[0] == b[0] == first and len(used & set(range(a[1], b[1] + 1))) == len(used) > 1 for a, b in merges):
        first += 1
    last = first
    for (row, left), (bottom, right) in merges:
        if row == first and bottom - row < 4:
            last = max(last, bottom, first + 1 if right > left else first)
    for (row, left), (_, right) in merges:
        if top <= row <= last:
            for column in range(left, min(right + 1, len(cells[row]))):
                cells[row][column] = cells[row][left]
    return last - top + 1


def clean_cell(text: str) -> str:
    """The cell on one line, with its pipes escaped."""
    return " ".join(text.split()).replace("|", "\\|")


def _without_empty_columns(rows: list[list[str]]) -> list[list[str]]:
    rows = [row for row in rows if any(row)]
    used = sorted({column for row in rows for column, cell in enumerate(row) if cell})
    return [[row[column] if column < len(row) else "" for column in used] for row in rows]


def _is_caption(row: list[str]) -> bool:
    """One text across the table: a single cell, or a merged one repeated in every column."""
    filled = [cell for cell in row if cell]
    return len(row) > 2 and len(set(filled)) == 1 and len(filled) in {1, len(row)}


def _merge_header(rows: list[list[str]]) -> list[str]:
    return [" ".join(dict.fromkeys(cell for cell in column if cell)) for column in zip(*rows, strict=True)]


def _line(cells: Row) -> str:
    return f"| {' | '.join(cells)} |"


def _rule(cells: Row) -> str:
    return f"|{' --- |' * len(cells)}"
