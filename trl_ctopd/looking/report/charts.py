"""Curves as inline SVG.

Drawn here rather than by matplotlib: a curve follows the reader's light or dark theme and page width through CSS, takes a
millisecond at each log, and needs no further package. Series differ in their dashes as well as in colour, and every point
shows its values when the pointer is over it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape


WIDTH, HEIGHT = 280, 150
LEFT, RIGHT, TOP, BOTTOM = 40, 8, 8, 20
MOST_POINTS = 200


@dataclass
class Series:
    """`points` are (step, value). NaN and infinite values are left out."""

    label: str
    points: Sequence[tuple[int, float]]

    def __post_init__(self):
        self.points = [(step, value) for step, value in self.points if math.isfinite(value)]


def curves(series: Sequence[Series], form: Callable[[float], str]) -> Markup:
    """One chart. `form` formats a value. The y axis starts at 0 unless a value is below."""
    points = [point for own in series for point in own.points]
    if not points:
        return Markup('<p class="none">nothing logged yet</p>')
    steps, values = zip(*points, strict=True)
    marks = ticks(min(0.0, *values), max(0.0, *values))
    low, high, first, last = marks[0], marks[-1], min(steps), max(steps)

    def x(step: float) -> str:
        return f"{LEFT + (step - first) / max(last - first, 1) * (WIDTH - LEFT - RIGHT):.1f}"

    def y(value: float) -> str:
        return f"{HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM):.1f}"

    lines = [
        Markup(
            '<line class="{}" x1="{}" x2="{}" y1="{}" y2="{}"/><text class="y" x="{}" y="{}" dy=".32em">{}</text>'
        ).format("axis" if mark == 0 else "grid", LEFT, WIDTH - RIGHT, y(mark), y(mark), LEFT - 6, y(mark), form(mark))
        for mark in marks
    ]
    for step, anchor in ((first, "start"), (last, "end"))[: 1 if first == last else 2]:
        lines.append(
            Markup('<text x="{}" y="{}" text-anchor="{}">{}{}</text>').format(
                x(step), HEIGHT - 5, anchor, "step " if step == first else "", f"{step:,}"
            )
        )
    for number, own in enumerate(series):
        shown = thinned(own.points)
        path = " ".join(f"{x(step)},{y(value)}" for step, value in shown)
        lines.append(Markup('<polyline class="s{}" points="{}"/>').format(number % 5, path))
        for step, value in shown:
            lines.append(
                Markup('<circle class="s{}{}" cx="{}" cy="{}" r="{}"><title>{}</title></circle>').format(
                    number % 5,
                    "" if len(shown) <= 20 else " quiet",
                    x(step),
                    y(value),
                    2 if len(shown) <= 20 else 5,
                    f"{own.label}: {form(value)} at step {step:,}",
                )
            )
    spoken = "; ".join(
        f"{own.label}: {form(own.points[0][1])} at step {own.points[0][0]:,}, {form(own.points[-1][1])} at step "
        f"{own.points[-1][0]:,}"
        for own in series
        if own.points
    )
    drawing = Markup("").join(lines)
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, escape(spoken), drawing
    )


def thinned(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most `MOST_POINTS` points. Each is the mean of a group of neighbours, at the last one's step."""
    size = -(-len(points) // MOST_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)] if size > 1 else []
    if not groups:
        return list(points)
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def ticks(low: float, high: float) -> list[float]:
    """Three to five round numbers that cover `low` to `high`."""
    span = high - low or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if span / (power * factor) <= 4)
    start, end = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * n for n in range(start, max(end, start + 1) + 1)]
