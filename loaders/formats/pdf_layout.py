"""The characters of a PDF page with their places: lines, and their order on pages set in columns.

Coordinates are upright as a reader sees the page: x to the right, y downwards, in points, page rotation applied.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loaders.text import SOFT_HYPHEN, continues, join_lines

if TYPE_CHECKING:
    from loaders.formats.pdf_tables import Table

_HYPHEN = 2  # pdfium's code for a hyphen that splits a word at the end of a line
_AROUND = 4  # lines before and after that show how wide the column is
_SHORT, _INDENT = 2.0, 1.2  # line heights by which a line that ends or begins a paragraph stands back
_OUTDENT = 3.0  # line heights that a paragraph may begin left of its first line
_COLUMN = 10  # line heights: narrower lines are labels, not columns of prose
_WIDER = 1.25  # times the width of a line: lines wider than that are not set in its column
_LEADING = 2.0  # line heights between the lines of one paragraph, at most
_GAP = 1.6  # character heights between the columns that pdfium runs into one line


@dataclass(slots=True)
class Box:
    """A rectangle; y grows downwards."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def width(self) -> float:
        """From left to right."""
        return self.right - self.left

    @property
    def height(self) -> float:
        """From top to bottom."""
        return self.bottom - self.top

    @property
    def middle(self) -> tuple[float, float]:
        """Its centre (x, y)."""
        return (self.left + self.right) / 2, (self.top + self.bottom) / 2


@dataclass(slots=True)
class Line:
    """A line of text; `pieces` are the parts of it that wide gaps separate."""

    text: str
    box: Box
    pieces: list[tuple[str, Box]]


class Upright:
    """Turns page space (y upwards, unrotated) into what a reader sees."""

    def __init__(self, page: Any) -> None:
        left, bottom, right, top = page.get_cropbox() if page.get_cropbox() else (0, 0, *page.get_size())
        self._origin, self._size = (left, bottom), (right - left, top - bottom)
        self._turns = page.get_rotation() // 90 % 4
        self.width: float
        self.height: float
        self.width, self.height = self._size if self._turns % 2 == 0 else self._size[::-1]

    def point(self, x: float, y: float) -> tuple[float, float]:
        """The upright place of a point in page space."""
        x, y = x - self._origin[0], y - self._origin[1]
        width, height = self._size
        return ((x, height - y), (y, x), (width - x, y), (height - y, width - x))[self._turns]

    def box(self, left: float, bottom: float, right: float, top: float) -> Box:
        """The upright rectangle of one in page space."""
        (x0, y0), (x1, y1) = self.point(left, bottom), self.point(right, top)
        return Box(min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1))


class PageText:
    """The characters of a page in the order of its content stream, in which nearly all producers write columns."""

    def __init__(self, page: Any) -> None:
        import pypdfium2.raw as raw

        self.upright = Upright(page)
        text_page = page.get_textpage()
        total = text_page.count_chars()
        self._codes = [raw.FPDFText_GetUnicode(text_page, index) for index in range(total)]
        self._boxes: list[Box] = []
        left, right, bottom, top = (ctypes.c_double() for _ in range(4))
        for index in range(total):
            raw.FPDFText_GetCharBox(text_page, index, left, right, bottom, top)
            self._boxes.append(self.upright.box(left.value, bottom.value, right.value, top.value))
        text_page.close()
        self.count = sum(1 for code in self._codes if code > 32)

    def points(self) -> list[tuple[float, float]]:
        """The centres of the visible characters."""
        return [box.middle for code, box in zip(self._codes, self._boxes, strict=True) if code > 32]

    def at_edge(self, line: Line, share: float) -> bool:
        """Whether the line stands in the top or bottom share of the page."""
        _, y = line.box.middle
        return not share * self.upright.height <= y <= (1 - share) * self.upright.height

    def items(self, tables: Sequence[Table]) -> list[Line | Table]:
        """The lines outside the tables, and the tables, filled, each where its first character stands."""
        found: list[Line | Table] = []
        current: list[int] = []
        inside: Table | None = None
        cell = (0, 0)

        def end_line() -> None:
            line = self._line(current)
            current.clear()
            if line is not None:
                found.append(line)

        for index, code in enumerate(self._codes):
            if code > 32 and code != 0xFFFE:
                x, y = self._boxes[index].middle
                table = next((table for table in tables if table.contains(x, y)), None)
                if table is not None and table is not inside:
                    end_line()
                    if not any(item is table for item in found):
                        found.append(table)
                elif table is None and inside is not None:
                    end_line()
                inside = table
                if table is not None:
                    cell = table.cell_at(x, y)
            if inside is not None:
                inside.add(cell, _char(code) or "\n")
            elif code in (10, 13):
                end_line()
            else:
                current.append(index)
                if code == _HYPHEN:
                    end_line()
        end_line()
        return found

    def _line(self, indexes: list[int]) -> Line | None:
        pieces: list[tuple[str, Box]] = []
        chars: list[str] = []
        box: Box | None = None
        for index in indexes:
            code, place = self._codes[index], self._boxes[index]
            if code > 32:
                height = max(place.height, box.height if box else 0, 1)
                if box is not None and place.left - box.right > _GAP * height:
                    pieces.append((_decode(chars), box))
                    chars, box = [], None
                box = place if box is None else _union(box, place)
            chars.append(_char(code))
        if box is None:
            return None
        pieces.append((_decode(chars), box))
        whole = box
        for _, other in pieces[:-1]:
            whole = _union(whole, other)
        return Line(" ".join(text for text, _ in pieces if text), whole, pieces)


def in_reading_order(lines: list[Line]) -> list[Line]:
    """The lines as they are, unless a two-column page was written row by row: then the left column first.

    Taken for that only when most pieces are as wide as a column, the two columns alternate in the file, and a gutter
    separates them; tables and forms, whose cells are short, stay row by row.
    """
    pieces = [Line(text, box, [(text, box)]) for line in lines for text, box in line.pieces if text]
    gutter = _gutter(pieces)
    if gutter is None:
        return lines
    sides = [_side(piece, gutter) for piece in pieces]
    inner = [side for side in sides if side]
    switches = sum(1 for one, other in itertools.pairwise(inner) if one != other)
    if switches < len(inner) // 3:
        return lines
    ordered: list[Line] = []
    columns: dict[str, list[Line]] = {"left": [], "right": []}
    for piece, side in zip(pieces, sides, strict=True):
        if side:
            columns[side].append(piece)
        else:  # across both columns: a title; what is above it comes before it
            ordered += [*columns["left"], *columns["right"], piece]
            columns = {"left": [], "right": []}
    return [*ordered, *columns["left"], *columns["right"]]


def paragraphs(lines: list[Line]) -> list[str]:
    """The texts of the lines, those of one paragraph joined.

    A paragraph goes on where its line reaches the right edge of the lines around it, the next line is not indented,
    and the characters at the break do not end a sentence or begin an item.
    """
    texts: list[str] = []
    for number, line in enumerate(lines):
        if number and _goes_on(lines, number - 1):
            texts[-1] = join_lines(texts[-1], line.text)
        else:
            texts.append(line.text)
    return texts


def _goes_on(lines: list[Line], number: int) -> bool:
    line, following = lines[number], lines[number + 1]
    if line.text.endswith(SOFT_HYPHEN):
        return True
    if len(line.pieces) > 1 or len(following.pieces) > 1 or not continues(line.text, following.text):
        return False  # columns of a table without rulings, or another sentence
    box, below, height = line.box, following.box, line.box.height
    if below.top < box.top:  # the top of the next column
        after = lines[number + 2].box if number + 2 < len(lines) else below
        placed = below.left >= box.right and box.width >= _COLUMN * height
        start = after.left
    else:
        first_line = Box(box.left - _OUTDENT * height, box.top, box.right, box.bottom)  # stands in, as a rule
        placed = _overlap(first_line, below) and below.top - box.bottom <= _LEADING * max(height, below.height)
        start = box.left
    if not placed or below.left > start + _INDENT * height:
        return False
    around = [other.box for other in lines[max(0, number - _AROUND) : number + _AROUND + 2]]
    widest = _WIDER * max(box.width, below.width)  # wider lines cross several columns
    right = max(other.right for other in around if other.width <= widest and _overlap(box, other))
    return box.right > right - _SHORT * height


def _overlap(one: Box, other: Box) -> bool:
    """Whether they stand in one column: at least half of the narrower is above or below the wider."""
    shared = min(one.right, other.right) - max(one.left, other.left)
    return shared >= 0.5 * min(one.width, other.width)


def _gutter(pieces: list[Line]) -> float | None:
    """The x between two columns of prose, None where the page is not set so."""
    if len(pieces) < 12:
        return None
    left, right = min(piece.box.left for piece in pieces), max(piece.box.right for piece in pieces)
    middle, width = (left + right) / 2, right - left
    wide = [piece for piece in pieces if 0.33 * width < piece.box.width < 0.5 * width]
    crossing = [piece for piece in pieces if _side(piece, middle) == ""]
    lefts = sum(1 for piece in wide if _side(piece, middle) == "left")
    enough = len(wide) > 0.6 * len(pieces) and 0.25 * len(wide) < lefts < 0.75 * len(wide)
    return middle if enough and len(crossing) < 0.2 * len(pieces) else None


def _side(piece: Line, gutter: float) -> str:
    return "left" if piece.box.right <= gutter else "right" if piece.box.left >= gutter else ""


def _char(code: int) -> str:
    if code == _HYPHEN:
        return SOFT_HYPHEN
    return " " if code in (0, 9, 0xFFFE) else "" if code in (10, 13) else chr(code)


def _decode(chars: list[str]) -> str:
    """The text; pdfium gives characters beyond U+FFFF as two surrogates."""
    text = "".join(chars).encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return " ".join(text.split())


def _union(one: Box, other: Box) -> Box:
    return Box(
        min(one.left, other.left),
        min(one.top, other.top),
        max(one.right, other.right),
        max(one.bottom, other.bottom),
    )
