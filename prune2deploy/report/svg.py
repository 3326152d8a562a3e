"""Small charts as inline SVG text; colours come from the page's style, so both themes work.

In: numbers. Out: ``<svg>`` elements without scripts or outside references.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 320
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 14, 40
_SPAN = 1e-9  # of the x axis of a lone point, which has one tick


@dataclass(frozen=True)
class Point:
    """A point of a line chart with the interval of its y value."""

    x: float
    y: float
    low: float
    high: float


def bar(part: float, whole: float, *, warn: bool = False) -> str:
    """A horizontal bar filled to ``part / whole``."""
    share = 100 * part / whole if whole else 0
    style = "warn" if warn else "on"
    return (
        f'<svg class="bar" viewBox="0 0 100 8" preserveAspectRatio="none" role="img" '
        f'aria-label="{share:.0f} per cent">'
        f'<rect class="off" width="100" height="8" rx="1"/>'
        f'<rect class="{style}" width="{share:.2f}" height="8" rx="1"/></svg>'
    )


def pair(before: float, after: float, whole: float) -> str:
    """Two thin bars, one above the other, on a common scale."""
    a, b = (100 * value / whole if whole else 0 for value in (before, after))
    return (
        '<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="base" width="{a:.2f}" height="4"/>'
        f'<rect class="on" y="5" width="{b:.2f}" height="4"/></svg>'
    )


def line_chart(points: Sequence[Point], x_label: str, y_label: str) -> str:
    """A line with interval whiskers; the y axis begins at 0."""
    xs = [p.x for p in points]
    x_low, x_high = min(xs), max(*xs, min(xs) + _SPAN)
    y_high = max(p.high for p in points) * 1.05 or 1.0

    def across(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def up(y: float) -> float:
        return HEIGHT - BOTTOM - y / y_high * (HEIGHT - TOP - BOTTOM)

    path = " ".join(f"{across(p.x):.1f},{up(p.y):.1f}" for p in points)
    whiskers = "".join(
        f'<line class="whisker" x1="{across(p.x):.1f}" x2="{across(p.x):.1f}" '
        f'y1="{up(p.low):.1f}" y2="{up(p.high):.1f}"/>'
        f'<circle class="dot" cx="{across(p.x):.1f}" cy="{up(p.y):.1f}" r="3.5">'
        f"<title>{escape(x_label)} {p.x:g}: {p.y:.4g} ({p.low:.4g}-{p.high:.4g})</title></circle>"
        for p in points
    )
    rows = "".join(_row(y_high * i / 4, up(y_high * i / 4)) for i in range(5))
    columns = "".join(_column(x, across(x)) for x in _ticks(x_low, x_high))
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(y_label)} against {escape(x_label)}">{rows}{columns}'
        f'<polyline class="line" points="{path}"/>{whiskers}'
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">'
        f'{escape(x_label)}</text><text x="4" y="{TOP - 2}">{escape(y_label)}</text></svg>'
    )


def _ticks(low: float, high: float) -> list[float]:
    return [low + (high - low) * i / 5 for i in range(6 if high - low > 2 * _SPAN else 1)]


def _row(value: float, y: float) -> str:
    return (
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>'
    )


def _column(value: float, x: float) -> str:
    return f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{value:.2g}</text>'
