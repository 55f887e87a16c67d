"""The temp image over time as SVG, a line for each kind of pull."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

from benchmarks.work import MIB

WIDTH, HEIGHT = 900, 420
LEFT, RIGHT, TOP, BOTTOM = 70, 220, 48, 52
COLOURS = ("#2f6f8f", "#3f8f4f", "#b3423a", "#8f6f2f", "#6f4f8f")
DASHES = ("", "", "", "6 3", "6 3")
POINTS_MAX = 200
"""Of one line: more are not seen."""
TICKS = 5

Samples = Mapping[str, Sequence[tuple[float, int]]]
"""kind -> (seconds, bytes)."""


def svg(samples: Samples) -> str:
    """Seconds from the pull's begin to the right, MiB in the temp image upwards."""
    longest = max((at for each in samples.values() for at, _ in each), default=1.0)
    most = max((held for each in samples.values() for _, held in each), default=MIB) / MIB
    right, top = _round_up(longest), _round_up(most)

    def x(seconds: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * seconds / right

    def y(mib: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * mib / top

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="22" font-size="14">Old data in the temp image while a guest writes '
        "as fast as it can and a backup pulls, MiB</text>",
    ]
    for tick in range(TICKS + 1):
        height, second = y(top * tick / TICKS), x(right * tick / TICKS)
        parts += [
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height:.1f}" y2="{height:.1f}" '
            'stroke="#ddd"/>',
            f'<text x="{LEFT - 8}" y="{height + 4:.1f}" text-anchor="end">'
            f"{top * tick / TICKS:g}</text>",
            f'<text x="{second:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">'
            f"{right * tick / TICKS:g}</text>",
        ]
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text x="{middle:.1f}" y="{HEIGHT - 12}" text-anchor="middle">seconds of the pull</text>'
    )
    for number, (kind, each) in enumerate(samples.items()):
        colour, dash = COLOURS[number % len(COLOURS)], DASHES[number % len(DASHES)]
        style = f'stroke="{colour}" stroke-width="2"' + (f' stroke-dasharray="{dash}"' * bool(dash))
        step = max(1, len(each) // POINTS_MAX)
        points = " ".join(f"{x(at):.1f},{y(held / MIB):.1f}" for at, held in each[::step])
        key = TOP + 20 * number
        parts += [
            f'<polyline fill="none" {style} points="{points}"/>',
            f'<line x1="{WIDTH - RIGHT + 16}" x2="{WIDTH - RIGHT + 46}" y1="{key}" y2="{key}" '
            f"{style}/>",
            f'<text x="{WIDTH - RIGHT + 54}" y="{key + 4}">{escape(kind)}</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])


def _round_up(value: float) -> float:
    """The next of 1, 2, 2.5, 5, 10 times a power of ten."""
    step = 1e-3
    while True:
        for factor in (1, 2, 2.5, 5):
            if step * factor >= value:
                return step * factor
        step *= 10
