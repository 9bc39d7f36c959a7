"""Line plots as SVG, by plain Python: a logarithmic x axis shared by a few panels, y from zero."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 360, 200  # of a panel's drawing area
_LEFT, _TOP, _GAP_X, _GAP_Y = 60, 70, 100, 90
_COLOURS = ("#1f6f8b", "#c8553d", "#6a994e")


@dataclass(frozen=True)
class Panel:
    """One plot: lines by label, each with a value for every x."""

    title: str
    unit: str
    lines: Sequence[tuple[str, Sequence[float]]]


def draw(title: str, xs: Sequence[float], panels: Sequence[Panel]) -> str:
    """The panels, two a row, under a title."""
    rows = math.ceil(len(panels) / 2)
    width, height = 2 * (_WIDTH + _GAP_X) + 20, _TOP + rows * (_HEIGHT + _GAP_Y) - 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        ' font-family="sans-serif" font-size="12" fill="#333">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{width / 2}" y="24" text-anchor="middle" font-size="14">{escape(title)}</text>',
    ]
    for number, panel in enumerate(panels):
        x = _LEFT + number % 2 * (_WIDTH + _GAP_X)
        y = _TOP + number // 2 * (_HEIGHT + _GAP_Y)
        parts += [f'<g transform="translate({x},{y})">', *_panel(panel, xs), "</g>"]
    return "\n".join([*parts, "</svg>\n"])


def _panel(panel: Panel, xs: Sequence[float]) -> list[str]:
    step, top = _scale(max(value for _, values in panel.lines for value in values))
    low, high = math.log10(min(xs)), math.log10(max(xs))

    def across(x: float) -> float:
        return _WIDTH * (math.log10(x) - low) / ((high - low) or 1)

    def down(y: float) -> float:
        return _HEIGHT * (1 - y / top)

    parts = [f'<text y="-14" font-size="13">{escape(panel.title)} ({escape(panel.unit)})</text>']
    for tick in range(round(top / step) + 1):
        y = down(tick * step)
        parts.append(f'<path d="M0 {y:.1f}H{_WIDTH}" stroke="#ddd"/>')
        parts.append(f'<text x="-8" y="{y + 4:.1f}" text-anchor="end">{tick * step:g}</text>')
    for x in xs:
        parts.append(f'<text x="{across(x):.1f}" y="{_HEIGHT + 18}" text-anchor="middle">{_short(x)}</text>')
    for number, (label, values) in enumerate(panel.lines):
        colour = _COLOURS[number % len(_COLOURS)]
        points = [(across(x), down(value)) for x, value in zip(xs, values, strict=True)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
        parts.append(
            f'<text x="{_WIDTH - 60 * number}" y="-14" text-anchor="end" fill="{colour}">{escape(label)}</text>'
        )
    return parts


def _scale(highest: float) -> tuple[float, float]:
    """(distance of the ticks, top of the axis): at most five steps of 1, 2 or 5 times a power of ten."""
    rough = (highest or 1) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return step, step * math.ceil(highest / step or 1)


def _short(number: float) -> str:
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{round(number / size, 1 if number < 2 * size else None):g}{letter}"
    return f"{number:g}"
