"""Line charts as SVG, readable on light and on dark pages. Nothing here knows what is plotted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 64, 150, 34, 46
COLOURS = ("#2f7ed8", "#d9822b", "#3d9970", "#b10dc9", "#888888", "#c23b22")
TEXT = 'font-family="sans-serif" font-size="12" fill="#888"'


@dataclass(frozen=True, slots=True)
class Line:
    """One curve; `joined` false draws its points alone."""

    label: str
    points: Sequence[tuple[float, float]]
    joined: bool = True


def chart(title: str, x_label: str, y_label: str, lines: Sequence[Line]) -> str:
    """An SVG document. Both axes begin at 0."""
    x_top = _round_up(max(x for line in lines for x, _ in line.points))
    y_top = _round_up(max(y for line in lines for _, y in line.points))
    wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + wide * x / x_top, TOP + high * (1 - y / y_top)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"<title>{escape(title)}</title>",
        f'<text x="{LEFT}" y="20" {TEXT} font-weight="bold">{escape(title)}</text>',
        f'<text x="{LEFT + wide / 2:.0f}" y="{HEIGHT - 10}" {TEXT} text-anchor="middle">{escape(x_label)}</text>',
        f'<text x="14" y="{TOP + high / 2:.0f}" {TEXT} text-anchor="middle" '
        f'transform="rotate(-90 14 {TOP + high / 2:.0f})">{escape(y_label)}</text>',
    ]
    for step in range(6):
        x, y = place(x_top * step / 5, y_top * step / 5)
        parts += [
            f'<path d="M{LEFT} {y:.1f}H{LEFT + wide}" stroke="#888" stroke-opacity="0.25"/>',
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" {TEXT} text-anchor="end">{y_top * step / 5:g}</text>',
            f'<text x="{x:.1f}" y="{TOP + high + 18}" {TEXT} text-anchor="middle">{x_top * step / 5:g}</text>',
        ]
    for number, line in enumerate(lines):
        parts += _curve(line, COLOURS[number % len(COLOURS)], [place(x, y) for x, y in line.points], number)
    return "\n".join([*parts, "</svg>", ""])


def _curve(line: Line, colour: str, places: Sequence[tuple[float, float]], number: int) -> list[str]:
    parts = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in places]
    if line.joined:
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
    x, y = WIDTH - RIGHT + 16, TOP + 12 + 20 * number
    parts.append(f'<circle cx="{x}" cy="{y - 4}" r="4" fill="{colour}"/>')
    parts.append(f'<text x="{x + 10}" y="{y}" {TEXT}>{escape(line.label)}</text>')
    return parts


def _round_up(value: float) -> float:
    """To the next of 1, 2, 2.5, 5 times a power of ten."""
    power = 1.0
    while power * 10 <= value:
        power *= 10
    while power > value:
        power /= 10
    return next(factor * power for factor in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if factor * power >= value)
