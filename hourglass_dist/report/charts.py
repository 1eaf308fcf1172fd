"""Line charts as SVG, to stand in a page: no script, nothing from elsewhere, sharp on paper.

Colours are CSS variables of the page: ``--c0`` to ``--c7``, ``--ink``, ``--faint``, ``--grid``.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 520, 230
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 10, 24
POINTS = 260
"""Of one line, at most: more are averaged in groups."""
COLOURS = 8

Points = Sequence[tuple[float, float]]

CLIP = (
    '<svg width="0" height="0" style="position:absolute"><clipPath id="plot">'
    f'<rect x="{LEFT - 4}" y="{TOP - 4}" width="{WIDTH - LEFT - RIGHT + 8}" '
    f'height="{HEIGHT - TOP - BOTTOM + 8}"/></clipPath></svg>'
)
"""Stands once in a page: lines end at the edge of their chart."""


@dataclass(frozen=True)
class Axis:
    """Numbers from ``low`` to ``high`` on a way of ``length`` units from ``start``."""

    low: float
    high: float
    start: float
    length: float
    is_log: bool = False

    def place(self, value: float) -> float:
        """Where a number lies."""
        low, high = self.low, self.high
        if self.is_log:
            low, high, value = math.log10(low), math.log10(high), math.log10(max(value, self.low))
        return self.start + self.length * (value - low) / (high - low)

    def ticks(self) -> list[float]:
        """Round numbers, three to seven of them; on a long logarithmic axis powers of ten, or 1, 2
        and 5 of each."""
        if self.is_log and self.high / self.low >= 4:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            powers = [10.0**power for power in range(first, last + 1, 1 + (last - first) // 6)]
            few = [factor * power for power in powers for factor in (1, 2, 5)]
            inside = [value for value in few if self.low <= value <= self.high]
            return inside if len(inside) < 8 else [v for v in powers if self.low <= v <= self.high]
        step = _round_step((self.high - self.low) / 5)
        first = math.ceil(self.low / step - 1e-9)
        count = math.floor(self.high / step + 1e-9) - first + 1
        return [(first + index) * step for index in range(count)]


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * 0.999)


def line_chart(
    title: str,
    series: Mapping[str, Points],
    *,
    note: str = "",
    is_log: bool = False,
    from_zero: bool = False,
    marks: Sequence[float] = (),
    of_x: str = "step",
    last_x: float = 0,
    colours: Mapping[str, str] | None = None,
) -> str:
    """A figure with one line for each of ``series``, in order of x; "" when no number is there.

    ``marks`` are places of x with a thin dashed line; x goes from 0 to ``last_x`` or farther.
    ``colours`` gives lines a colour of their own. What lies far above the rest at the start of a
    line is cut off.
    """
    lines = {name: average(points) for name, points in series.items() if points}
    if not lines:
        return ""
    farthest = max([last_x, *(x for points in lines.values() for x, _ in points)])
    x = Axis(0, farthest or 1, LEFT, WIDTH - LEFT - RIGHT)
    own = colours or {}
    paints = {name: own.get(name, f"var(--c{i % COLOURS})") for i, name in enumerate(lines)}
    y = _y_axis(list(lines.values()), is_log, from_zero)
    parts = [_grid(x, y, of_x)]
    parts += [_mark(x.place(at)) for at in marks if x.low < at < x.high]
    parts += [_line(paints[name], points, x, y) for name, points in lines.items()]
    caption = f"<figcaption><b>{html.escape(title)}</b>{_note(note)}</figcaption>"
    image = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">'
        f"{''.join(parts)}</svg>"
    )
    return f"<figure>{caption}{_legend(lines, paints)}{image}</figure>"


def average(points: Points) -> list[tuple[float, float]]:
    """At most ``POINTS`` points: means of equally many neighbours, the last point as it is."""
    group = -(-len(points) // POINTS)
    means = []
    for start in range(0, len(points), group):
        some = points[start : start + group]
        means.append((some[-1][0], sum(value for _, value in some) / len(some)))
    return [*means[:-1], points[-1]]


def _y_axis(lines: Sequence[Points], is_log: bool, from_zero: bool) -> Axis:
    values = [value for points in lines for _, value in points]
    late = [value for points in lines for _, value in points[len(points) // 10 :]]
    low, high = min(values), max(values)
    if len(lines[0]) > 40 and not is_log:
        high = min(high, max(late) + 0.25 * (max(late) - low))
    is_log = is_log and low > 0
    if from_zero:
        low = min(0.0, low)
    if is_log:
        low, high = low / 1.15, high * 1.15
    else:
        room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
        low, high = (low if from_zero else low - room), high + room
    return Axis(low, high, HEIGHT - BOTTOM, -(HEIGHT - TOP - BOTTOM), is_log)


def _grid(x: Axis, y: Axis, of_x: str) -> str:
    bottom = HEIGHT - BOTTOM
    parts = []
    for tick in y.ticks():
        at = y.place(tick)
        parts.append(
            f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>'
            f'<text x="{LEFT - 7}" y="{at + 4:.1f}" text-anchor="end">{number(tick)}</text>'
        )
    ticks = x.ticks()
    for index, tick in enumerate(ticks):
        at = x.place(tick)
        text = f"{of_x} {number(tick)}" if index == len(ticks) - 1 else number(tick)
        anchor = "end" if at > WIDTH - RIGHT - 40 else "middle"
        parts.append(
            f'<path class="axis" d="M{at:.1f} {bottom}v4"/>'
            f'<text x="{at:.1f}" y="{bottom + 17}" text-anchor="{anchor}">{text}</text>'
        )
    return "".join(parts) + f'<path class="axis" d="M{LEFT} {bottom}H{WIDTH - RIGHT}"/>'


def _mark(at: float) -> str:
    return f'<path class="mark" d="M{at:.1f} {TOP}V{HEIGHT - BOTTOM}"/>'


def _line(colour: str, points: Points, x: Axis, y: Axis) -> str:
    places = [(x.place(at), y.place(value)) for at, value in points]
    path = "L".join(f"{across:.1f} {down:.1f}" for across, down in places)
    dots = places if len(places) < 25 else places[-1:]
    circles = "".join(
        f'<circle cx="{a:.1f}" cy="{d:.1f}" r="2.6" fill="{colour}"/>' for a, d in dots
    )
    line = f'<path class="line" d="M{path}" stroke="{colour}"/>{circles}'
    return f'<g clip-path="url(#plot)">{line}</g>'


def _legend(lines: Mapping[str, Points], paints: Mapping[str, str]) -> str:
    items = [
        f'<span><i style="background:{paints[name]}"></i>{html.escape(name)} '
        f"<b>{number(points[-1][1])}</b></span>"
        for name, points in lines.items()
    ]
    return f'<p class="legend">{"".join(items)}</p>'


def _note(note: str) -> str:
    return f" <small>{html.escape(note)}</small>" if note else ""


def number(value: float) -> str:
    """Four digits, with k, M, G for large numbers: ``1.75``, ``33.1 k``, ``2.1e-05``."""
    size = abs(value)
    if size >= 1e15 or (size and size < 1e-3):
        return f"{value:.2g}"
    for power, unit in ((12, " T"), (9, " G"), (6, " M"), (4, " k")):
        if size >= 10**power:
            return f"{value / 10 ** (power if power != 4 else 3):.4g}{unit}"
    return f"{value:.4g}"
