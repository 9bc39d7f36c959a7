"""Where a text can be cut for quoting: sentences, and the clauses long sentences are made of."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import NamedTuple

LONGEST_CLAUSE = 90  # characters; what has no punctuation (a speech transcript) is cut into windows of at most this
_LONG_CLAUSE = 60  # from here on a clause is also cut at the marks of an enumeration
_ENUMERATED = 25  # characters at least between two such cuts: single items are not worth quoting
_SHORT_CLAUSE = 4  # "例如，" joins what follows
_LONGEST_BRACKET = 40  # within brackets up to this long nothing is cut

# Full stops with the quotation marks and brackets that close after them; a Latin full stop needs white space
# behind it and, since "K. altus" is a name, more than one letter before.
_SENTENCE_END = re.compile(r"""(?:[。！？!?…]+|(?<=[A-Za-z0-9]{2})\.(?=\s))[”’」』）)\]"']*\s*|\n+""")
_OPENING = "（(《“「『【[〈"
_CLOSING = "）)》”」』】]〉"
_ENUMERATION_MARK = "、"
_MARK = re.compile(f"[{re.escape(_OPENING + _CLOSING + _ENUMERATION_MARK)}，；：;,]")


class Clause(NamedTuple):
    """A piece of a text that can be quoted by itself, and the number of the sentence it belongs to."""

    start: int
    end: int
    sentence: int


def split_clauses(text: str, *, longest: int = LONGEST_CLAUSE) -> list[Clause]:
    """Clauses of `text` in order, without white space round sentences; they cover all else and do not overlap.

    A line is a sentence, too: a heading, an item of a list, a line of code. A row of a Markdown table is never cut,
    any other clause is at most `longest` characters long.
    """
    found: list[Clause] = []
    for number, (start, end) in enumerate(_sentences(text)):
        if text[start] == "|":
            found.append(Clause(start, end, number))
        else:
            pieces = _fit(text, _cut(text, start, end), longest)
            found.extend(Clause(a, b, number) for a, b in pieces)
    return found


def _sentences(text: str) -> Iterator[tuple[int, int]]:
    bounds = [0, *(found.end() for found in _SENTENCE_END.finditer(text)), len(text)]
    for start, end in itertools.pairwise(bounds):
        piece = text[start:end]
        if piece and not piece.isspace():
            yield start + len(piece) - len(piece.lstrip()), start + len(piece.rstrip())


def _cut(text: str, start: int, end: int) -> list[tuple[int, int]]:
    """A sentence cut behind its clause marks; very short pieces stay with the next."""
    strong, weak = _marks(text, start, end)
    clauses: list[tuple[int, int]] = []
    for a, b in itertools.pairwise([start, *strong, end]):
        if b - a > _LONG_CLAUSE:
            clauses.extend(_cut_enumeration(a, b, [cut for cut in weak if a < cut < b]))
        elif clauses and clauses[-1][1] - clauses[-1][0] < _SHORT_CLAUSE:
            clauses[-1] = (clauses[-1][0], b)
        else:
            clauses.append((a, b))
    return clauses


def _marks(text: str, start: int, end: int) -> tuple[list[int], list[int]]:
    """Offsets behind clause marks and behind enumeration marks, but for those in brackets and in numbers like 1,574."""
    strong: list[int] = []
    weak: list[int] = []
    opened: list[int] = []
    for mark in _MARK.finditer(text, start, end - 1):
        place, character = mark.start(), mark.group()
        if character in _OPENING:
            opened.append(place)
        elif character in _CLOSING and opened:
            opened.pop()
        elif opened and place - opened[-1] < _LONGEST_BRACKET:
            continue
        elif character == _ENUMERATION_MARK:
            weak.append(place + 1)
        elif character != "," or not text[place + 1].isdigit():
            strong.append(place + 1)
    return strong, weak


def _cut_enumeration(start: int, end: int, cuts: list[int]) -> Iterator[tuple[int, int]]:
    for cut in cuts:
        if cut - start >= _ENUMERATED:
            yield start, cut
            start = cut
    yield start, end


def _fit(text: str, clauses: list[tuple[int, int]], longest: int) -> Iterator[tuple[int, int]]:
    """Clauses as they are or, where longer than `longest`, in windows that end at a space if there is one."""
    for start, end in clauses:
        while end - start > longest:
            space = text.rfind(" ", start + longest // 2, start + longest)
            cut = space + 1 if space >= 0 else start + longest
            yield start, cut
            start = cut
        yield start, end
