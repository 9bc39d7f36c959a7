"""Tables on a PDF page, found by the lines that rule them."""

from __future__ import annotations

import ctypes
import itertools
import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from loaders.formats.pdf_layout import PageText, Upright
from loaders.formats.tables import spread_header

_SNAP = 3.0  # points: lines this close are one line, ends this close meet
_THIN = 4.0  # points: a filled rectangle not thicker is a drawn line
_MIN_LENGTH = 6.0
_MAX_PATHS = 20_000  # on a page; maps and plots have more
_MAX_SEGMENTS = 2_000  # of one path; curves of plots have more
_MAX_CROSSINGS = 250_000
_MAX_CELLS = 20_000
_MIN_FILLED = 0.3  # share of cells with text: below, the lines are a diagram's
_CJK_BREAK = re.compile(r"(?<=[\u3000-\u9fff\uff00-\uffef])\s*\n\s*(?=[\u3000-\u9fff\uff00-\uffef(])")


Point = tuple[float, float]
Cell = tuple[int, int]  # row, column


class Ruling(NamedTuple):
    """A straight line along an axis: at `at` on the other axis, from `start` to `end`."""

    at: float
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Section:
    """Rows of a table that share their columns, with a header of their own."""

    rows: list[list[str]]
    header_rows: int
    columns: tuple[float, ...]
    """x where each column begins."""


class Table:
    """A grid of cells, some merged, that is filled with text character by character."""

    def __init__(self, columns: list[float], lines: list[float], owner: dict[Cell, Cell]) -> None:
        """
        Args:
            columns: x of the vertical lines, one more than columns.
            lines: y of the horizontal lines, one more than rows.
            owner: cell -> the first cell of the merged cell it belongs to (mostly itself).
        """
        self._columns, self._lines, self._owner = columns, lines, owner
        self._chars: dict[Cell, list[str]] = defaultdict(list)

    def contains(self, x: float, y: float) -> bool:
        """Whether the point is inside."""
        return self._columns[0] < x < self._columns[-1] and self._lines[0] < y < self._lines[-1]

    def cell_at(self, x: float, y: float) -> Cell:
        """The first cell of the (merged) cell that holds a point inside."""
        row, column = bisect_right(self._lines, y) - 1, bisect_right(self._columns, x) - 1
        return self._owner[min(row, len(self._lines) - 2), min(column, len(self._columns) - 2)]

    def add(self, cell: Cell, char: str) -> None:
        """Append to the text of the cell."""
        self._chars[cell].append(char)

    def is_filled_by(self, points: Iterable[Point]) -> bool:
        """Whether enough cells hold one of the points (characters) for a table; diagrams hold few."""
        filled = {self.cell_at(x, y) for x, y in points if self.contains(x, y)}
        rows, columns = {row for row, _ in filled}, {column for _, column in filled}
        share = len(filled) / len(set(self._owner.values()))
        return len(rows) > 1 and len(columns) > 1 and len(filled) > 2 and share >= _MIN_FILLED

    def sections(self) -> list[Section]:
        """The table, cut where a row across its whole width announces rows of other columns."""
        text = {cell: _cell_text("".join(chars)) for cell, chars in self._chars.items()}
        starts = [self._starts(row) for row in range(len(self._lines) - 1)]
        cuts = [
            row
            for row in range(1, len(starts) - 1)
            if len(starts[row]) == 1 < len(starts[row - 1]) and starts[row - 1] != starts[row + 1]
        ]
        bounds = [0, *cuts, len(starts)]
        return [self._section(text, first, last) for first, last in itertools.pairwise(bounds)]

    def _starts(self, row: int) -> tuple[int, ...]:
        """The columns in which a cell of the row begins."""
        return tuple(sorted({self._owner[row, column][1] for column in range(len(self._columns) - 1)}))

    def _section(self, text: dict[Cell, str], first: int, last: int) -> Section:
        columns = sorted({column for row in range(first, last) for column in self._starts(row)})
        rows = [[text.get((row, column), "") for column in columns] for row in range(first, last)]
        ends: dict[Cell, Cell] = {}
        for row in range(first, last):
            for index, column in enumerate(columns):
                top, left = self._owner[row, column]
                ends[max(top - first, 0), columns.index(left)] = (row - first, index)
        merges = [(start, end) for start, end in ends.items() if start != end]
        return Section(rows, spread_header(rows, merges), tuple(self._columns[column] for column in columns))


def find_tables(page: Any, text: PageText) -> list[Table]:
    """The ruled tables of at least two rows and two columns whose cells hold text."""
    horizontal, vertical = _rulings(page, text.upright)
    if len(horizontal) < 3 or len(vertical) < 2 or len(horizontal) * len(vertical) > _MAX_CROSSINGS:
        return []
    grids = [grid for group in _groups(horizontal, vertical) if (grid := _grid(*group)) is not None]
    points = text.points() if grids else []
    return [grid for grid in grids if grid.is_filled_by(points)]


def _rulings(page: Any, upright: Upright) -> tuple[list[Ruling], list[Ruling]]:
    """(horizontal, vertical) lines drawn on the page, pieces of one line joined."""
    import pypdfium2.raw as raw

    horizontal: list[Ruling] = []
    vertical: list[Ruling] = []
    paths = page.get_objects(filter=[raw.FPDF_PAGEOBJ_PATH], max_depth=5)
    for path in itertools.islice(paths, _MAX_PATHS):
        for start, end in _edges(path):
            (x0, y0), (x1, y1) = upright.point(*start), upright.point(*end)
            if abs(y0 - y1) <= 1:
                horizontal.append(Ruling((y0 + y1) / 2, min(x0, x1), max(x0, x1)))
            elif abs(x0 - x1) <= 1:
                vertical.append(Ruling((x0 + x1) / 2, min(y0, y1), max(y0, y1)))
    return _joined(horizontal), _joined(vertical)


def _edges(path: Any) -> Iterator[tuple[Point, Point]]:
    """The straight edges of a drawn path in page space; a thin filled rectangle is one edge."""
    import pypdfium2.raw as raw

    fill, stroke = ctypes.c_int(), ctypes.c_int()
    count = raw.FPDFPath_CountSegments(path)
    if not raw.FPDFPath_GetDrawMode(path, fill, stroke) or not (fill.value or stroke.value) or count > _MAX_SEGMENTS:
        return
    for points in _subpaths(path, count):
        xs, ys = [x for x, _ in points], [y for _, y in points]
        width, height = max(xs) - min(xs), max(ys) - min(ys)
        if fill.value and min(width, height) <= _THIN:
            x, y = (min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2
            yield ((min(xs), y), (max(xs), y)) if width > height else ((x, min(ys)), (x, max(ys)))
        elif stroke.value or len(points) <= 5:
            yield from itertools.pairwise(points)


def _subpaths(path: Any, count: int) -> Iterator[list[Point]]:
    """The runs of straight lines in a path; curves separate them."""
    import pypdfium2.raw as raw

    matrix, form = path.get_matrix(), path.container
    while form is not None:
        matrix, form = matrix.multiply(form.get_matrix()), form.container
    points: list[Point] = []
    x, y = ctypes.c_float(), ctypes.c_float()
    for index in range(count):
        segment = raw.FPDFPath_GetPathSegment(path, index)
        kind = raw.FPDFPathSegment_GetType(segment)
        raw.FPDFPathSegment_GetPoint(segment, x, y)
        if kind != raw.FPDF_SEGMENT_LINETO:
            if len(points) > 1:
                yield points
            points = []
        points.append(matrix.on_point(x.value, y.value))
        if raw.FPDFPathSegment_GetClose(segment) and len(points) > 2:
            points.append(points[0])
    if len(points) > 1:
        yield points


def _joined(rulings: list[Ruling]) -> list[Ruling]:
    """The rulings with those that lie on one line and touch joined, short ones left out."""
    joined: list[Ruling] = []
    for group in _clusters(rulings):
        at = sum(ruling.at for ruling in group) / len(group)
        start, end = None, 0.0
        for ruling in sorted(group, key=lambda ruling: ruling.start):
            if start is None:
                start, end = ruling.start, ruling.end
            elif ruling.start <= end + _SNAP:
                end = max(end, ruling.end)
            else:
                joined.append(Ruling(at, start, end))
                start, end = ruling.start, ruling.end
        if start is not None:
            joined.append(Ruling(at, start, end))
    return [ruling for ruling in joined if ruling.end - ruling.start >= _MIN_LENGTH]


def _clusters(rulings: list[Ruling]) -> list[list[Ruling]]:
    """Groups of rulings whose positions differ by less than the snap from one to the next."""
    groups: list[list[Ruling]] = []
    for ruling in sorted(rulings):
        if groups and ruling.at - groups[-1][-1].at <= _SNAP:
            groups[-1].append(ruling)
        else:
            groups.append([ruling])
    return groups


def _groups(horizontal: list[Ruling], vertical: list[Ruling]) -> Iterator[tuple[list[Ruling], list[Ruling]]]:
    """Horizontal and vertical rulings that hang together."""
    sets = _DisjointSets()
    for h in horizontal:
        for v in vertical:
            if _covers(h, v.at) and _covers(v, h.at):
                sets.join(("h", h), ("v", v))
    groups: dict[Any, tuple[list[Ruling], list[Ruling]]] = defaultdict(lambda: ([], []))
    for axis, ruling in sets:
        groups[sets.find((axis, ruling))][0 if axis == "h" else 1].append(ruling)
    yield from groups.values()


def _grid(horizontal: list[Ruling], vertical: list[Ruling]) -> Table | None:
    """The table the rulings make, None where it has fewer than two rows or columns."""
    lines, columns = _positions(horizontal, vertical), _positions(vertical, horizontal)
    height, width = len(lines) - 1, len(columns) - 1
    if height < 2 or width < 2 or height * width > _MAX_CELLS:
        return None
    sets = _DisjointSets()
    for row in range(height):
        y = (lines[row] + lines[row + 1]) / 2
        for column in range(width):
            x = (columns[column] + columns[column + 1]) / 2
            sets.find((row, column))
            if column + 1 < width and not _is_ruled(vertical, columns[column + 1], y):
                sets.join((row, column), (row, column + 1))
            if row + 1 < height and not _is_ruled(horizontal, lines[row + 1], x):
                sets.join((row, column), (row + 1, column))
    first: dict[Any, Cell] = {}
    owner: dict[Cell, Cell] = {}
    for cell in sorted(sets):
        root = sets.find(cell)
        row, column = first.get(root, cell)
        first[root] = (row, min(column, cell[1]))
    for cell in sets:
        owner[cell] = first[sets.find(cell)]
    return Table(columns, lines, owner)


def _positions(rulings: list[Ruling], across: list[Ruling]) -> list[float]:
    """Where the rulings lie, and where most of those across them end: tables are often open at the sides."""
    positions = [sum(ruling.at for ruling in group) / len(group) for group in _clusters(rulings)]
    for end in ("start", "end"):
        values = sorted(getattr(ruling, end) for ruling in across)
        usual = values[len(values) // 2]
        shared = sum(1 for value in values if abs(value - usual) <= _SNAP)
        if shared > 0.6 * len(values) and (usual < positions[0] - 2 * _SNAP or usual > positions[-1] + 2 * _SNAP):
            positions.append(usual)
    return sorted(positions)


def _is_ruled(rulings: list[Ruling], at: float, across: float) -> bool:
    return any(abs(ruling.at - at) <= _SNAP and _covers(ruling, across) for ruling in rulings)


def _covers(ruling: Ruling, position: float) -> bool:
    return ruling.start - _SNAP <= position <= ruling.end + _SNAP


def _cell_text(text: str) -> str:
    """The cell's text, line breaks inside Chinese and hyphenated words taken out."""
    text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return _CJK_BREAK.sub("", text.replace("\u00ad\n", "").replace("\u00ad", "")).strip()


class _DisjointSets:
    """Union-find over anything hashable; iterates over its members in the order they came."""

    def __init__(self) -> None:
        self._parent: dict[Any, Any] = {}

    def __iter__(self) -> Iterator[Any]:
        return iter(list(self._parent))

    def find(self, member: Any) -> Any:
        """The representative of the member's set."""
        self._parent.setdefault(member, member)
        while self._parent[member] != member:
            self._parent[member] = self._parent[self._parent[member]]
            member = self._parent[member]
        return member

    def join(self, one: Any, other: Any) -> None:
        """Make the two sets one."""
        self._parent[self.find(one)] = self.find(other)
