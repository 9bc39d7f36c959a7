"""The numbers Word prints before paragraphs ("第一条", "1.2", bullets), which the file does not hold as text."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

_W = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"
_DIGITS = "零一二三四五六七八九"
_CHINESE = {"chineseCounting", "chineseCountingThousand", "japaneseCounting", "taiwaneseCounting", "ideographDigital"}


class _Level(NamedTuple):
    format: str
    pattern: str  # "第%1条"
    start: int


class Numbering:
    """Counts the numbered paragraphs of one document, in order."""

    def __init__(self, root: Any, styles: Mapping[str | None, Any]) -> None:
        self._styles = styles
        self._levels: dict[str, dict[int, _Level]] = {}
        self._abstract: dict[str, str] = {}
        self._counts: dict[str, dict[int, int]] = defaultdict(dict)
        if root is None:
            return
        for abstract in root.iter(f"{_W}abstractNum"):
            self._levels[abstract.get(f"{_W}abstractNumId")] = {
                _integer(level.get(f"{_W}ilvl")): _read_level(level) for level in abstract.iter(f"{_W}lvl")
            }
        for number in root.iter(f"{_W}num"):
            self._abstract[number.get(f"{_W}numId")] = _value(number.find(f"{_W}abstractNumId")) or ""

    def label(self, paragraph: Any) -> str:
        """The label with the space after it, "" for a paragraph without one. Counts: call once, in document order."""
        number_id, depth = self._reference(paragraph)
        key = self._abstract.get(number_id or "", "")
        levels = self._levels.get(key, {})
        if depth not in levels:
            return ""
        level, counts = levels[depth], self._counts[key]
        if level.format == "bullet":
            return "- "
        counts[depth] = counts.get(depth, level.start - 1) + 1
        for deeper in [other for other in counts if other > depth]:
            del counts[deeper]

        def shown(found: re.Match[str]) -> str:
            index = int(found.group(1)) - 1
            if index not in levels:
                return ""
            style = level.format if index == depth else levels[index].format
            return _format(counts.get(index, levels[index].start), style)

        label = re.sub(r"%(\d)", shown, level.pattern)
        return f"{label} " if label else ""

    def _reference(self, paragraph: Any) -> tuple[str | None, int]:
        """(numId, level) of the paragraph, else of its style or a style that is based on."""
        properties = paragraph.find(f"{_W}pPr")
        seen: set[str | None] = set()
        depth: int | None = None
        while properties is not None:
            number = properties.find(f"{_W}numPr")
            if number is not None:
                own = _value(number.find(f"{_W}ilvl"))
                depth = _integer(own) if depth is None and own is not None else depth
                if (number_id := _value(number.find(f"{_W}numId"))) is not None:
                    return number_id, depth or 0
            style_id = _value(properties.find(f"{_W}pStyle"))
            if style_id is None:
                return None, 0
            properties = None
            while style_id not in seen and style_id in self._styles and properties is None:
                seen.add(style_id)
                style = self._styles[style_id]
                properties = style.find(f"{_W}pPr")
                if properties is None or properties.find(f"{_W}numPr") is None:
                    properties, style_id = None, _value(style.find(f"{_W}basedOn"))
        return None, 0


def chinese_number(number: int) -> str:
    """一, 十, 十二, 一百零五 ... up to 9,999; digits beyond."""
    if not 0 < number < 10_000:
        return str(number)
    text, gap = "", False
    for unit, name in ((1000, "千"), (100, "百"), (10, "十"), (1, "")):
        digit, number = divmod(number, unit)
        if digit:
            text += ("零" if gap and text else "") + _DIGITS[digit] + name
        gap = digit == 0
    return text.removeprefix("一") if text.startswith("一十") else text


def _format(number: int, style: str) -> str:
    if style in _CHINESE:
        return chinese_number(number)
    if style in {"lowerLetter", "upperLetter"}:
        letter = chr(ord("a") + (number - 1) % 26)
        return letter.upper() if style == "upperLetter" else letter
    if style in {"lowerRoman", "upperRoman"}:
        return _roman(number).lower() if style == "lowerRoman" else _roman(number)
    if style.startswith("decimalEnclosedCircle") and 1 <= number <= 20:
        return chr(ord("①") + number - 1)
    return "" if style == "none" else str(number)


def _roman(number: int) -> str:
    if not 0 < number < 4000:
        return str(number)
    text = ""
    for value, letters in zip(
        (1000, 900, 500, 400, 100, 90, 50, 40, 10, 9, 5, 4, 1),
        ("M", "CM", "D", "CD", "C", "XC", "L", "XL", "X", "IX", "V", "IV", "I"),
        strict=True,
    ):
        text += letters * (number // value)
        number %= value
    return text


def _read_level(level: Any) -> _Level:
    return _Level(
        _value(level.find(f"{_W}numFmt")) or "decimal",
        _value(level.find(f"{_W}lvlText")) or "",
        _integer(_value(level.find(f"{_W}start")) or "1"),
    )


def _value(element: Any) -> str | None:
    value = element.get(f"{_W}val") if element is not None else None
    return str(value) if value is not None else None


def _integer(text: str | None) -> int:
    return int(text) if text is not None and text.isdecimal() and len(text) < 6 else 0
