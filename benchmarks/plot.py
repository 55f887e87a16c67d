"""A bar chart of the ratios as SVG: one bar a row, to the right of 1 is better than the peer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from xml.sax.saxutils import escape

from benchmarks.ratios import ERROR, SHORT, Result
from benchmarks.rows import LOWER, Row

WIDTH = 1000
LEFT = 560
RIGHT = 60
BAR = 14
PITCH = 22
TOP = 56
STEPS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8, 16)

COLOURS = {True: "#b3423a", False: "#2f6f8f"}


def svg(rows: Sequence[Row], results: Sequence[Result]) -> str:
    """Bars of the median ratio on a scale of powers of two; a tick where there is something to
    reach, a thin line from the lowest to the highest. Where less is better, ratios are turned
    over, so that right is better everywhere. Rows without a ratio are named, with no bar."""
    shown = list(zip(rows, results, strict=True))
    height = TOP + PITCH * len(shown) + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        '<text x="10" y="20" font-size="14">fleecenbd beside others: how many times as good, '
        "median (line: all rounds; tick: to reach)</text>",
    ]
    for step in STEPS:
        words = f"{step:g}" if step >= 1 else f"1/{1 / step:g}"
        colour = "#555" if step == 1 else "#ddd"
        parts.append(
            f'<line x1="{_x(step):.1f}" x2="{_x(step):.1f}" y1="{TOP - 8}" y2="{height - 16}" '
            f'stroke="{colour}"/>'
        )
        parts.append(f'<text x="{_x(step):.1f}" y="{TOP - 14}" text-anchor="middle">{words}</text>')
    for index, (row, result) in enumerate(shown):
        parts += _bar(row, result, TOP + PITCH * index)
    return "\n".join([*parts, "</svg>", ""])


def _bar(row: Row, result: Result, y: int) -> list[str]:
    middle = y + BAR / 2
    parts = [
        f'<text x="{LEFT - 130}" y="{y + 11}" text-anchor="end">{escape(row.title)}</text>',
        f'<text x="{LEFT - 124}" y="{y + 11}" fill="#777">{escape(row.theirs)}</text>',
    ]
    if result.ratio is None or result.verdict == ERROR:
        parts.append(f'<text x="{_x(1) + 6:.1f}" y="{y + 11}">{result.verdict}</text>')
        return parts
    ends = sorted(_x(_good(row, ratio)) for ratio in (result.lowest or 1, result.highest or 1))
    start, end = sorted((_x(1), _x(_good(row, result.ratio))))
    colour = COLOURS[result.verdict == SHORT]
    parts.append(
        f'<rect x="{start:.1f}" y="{y}" width="{end - start:.1f}" height="{BAR}" fill="{colour}"/>'
    )
    parts.append(
        f'<line x1="{ends[0]:.1f}" x2="{ends[1]:.1f}" y1="{middle}" y2="{middle}" stroke="black"/>'
    )
    if row.least is not None and not row.absolute:
        tick = _x(_good(row, row.least))
        parts.append(
            f'<line x1="{tick:.1f}" x2="{tick:.1f}" y1="{y - 3}" y2="{y + BAR + 3}" '
            f'stroke="black" stroke-width="2"/>'
        )
    return parts


def _good(row: Row, ratio: float) -> float:
    return 1 / max(ratio, 1e-9) if row.better == LOWER else ratio


def _x(ratio: float) -> float:
    """Where a ratio is drawn; what lies outside of the scale ends at its end."""
    lowest, highest = math.log2(STEPS[0]), math.log2(STEPS[-1])
    place = min(max(math.log2(max(ratio, 1e-9)), lowest), highest)
    return LEFT + (WIDTH - LEFT - RIGHT) * (place - lowest) / (highest - lowest)
