"""Plots for a page (SVG) or for a file (PNG), by matplotlib, which is imported when first needed.

An SVG keeps its text as text and takes its colours from the page (``--c0`` to ``--c7`` and the
others of ``style.py``), so it follows light, dark and paper. Equal numbers give equal bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Points = Sequence[tuple[float, float]]

SMALL, SLIM, BROAD = (345, 190), (345, 250), (740, 330)
"""Width and height of a plot, CSS pixels: in one of three columns, on a phone, on top of a page."""
MOST_POINTS = 260
"""Maximum number of points of one line; more are averaged in groups."""
COLOURS = ("#2f6db3", "#d9772b", "#3c9a6b", "#a04a97", "#c23b4e", "#7a6a2f", "#2a9aa6", "#6b6f7a")
INK, FAINT, GRID = "#22252b", "#6d7380", "#e8e6e0"
_VARIABLES = {colour: f"var(--c{index})" for index, colour in enumerate(COLOURS)} | {
    INK: "var(--ink)",
    FAINT: "var(--faint)",
    GRID: "var(--grid)",
}


def css(colour: str) -> str:
    """Return the CSS variable of a colour."""
    return _VARIABLES[colour]


def number(value: float) -> str:
    """Return a number of four digits, with k, M, G or T: ``1.75``, ``33.1 k``, ``2.1e-05``."""
    size = abs(value)
    if size >= 1e15 or (size and size < 1e-3):
        return f"{value:.2g}"
    for power, unit in ((12, " T"), (9, " G"), (6, " M"), (4, " k")):
        if size >= 10**power:
            return f"{value / 10 ** (power if power != 4 else 3):.4g}{unit}"
    return f"{value:.4g}"


def line_plot(
    series: Mapping[str, Points],
    colours: Mapping[str, str],
    *,
    size: tuple[int, int] = SMALL,
    is_log: bool = False,
    from_zero: bool = False,
    marks: Sequence[float] = (),
    last_x: float = 0,
) -> Any:
    """Draw a line for each of ``series`` over steps from 0 to ``last_x`` or farther.

    ``marks`` are steps with a dashed line. The beginning of a line that is far above the rest is
    cut off; a break mark on the axis then shows the highest value.
    """
    figure, axes = _figure(size)
    lines = {name: average(points) for name, points in series.items()}
    values = [value for points in lines.values() for _, value in points]
    is_log = is_log and min(values) > 0
    low, high = _range(list(lines.values()), values, is_log, from_zero)
    last = max([last_x, 1, *(points[-1][0] for points in lines.values())])
    for name, points in lines.items():
        xs, ys = zip(*points, strict=True)
        marker = "o" if len(points) < 25 else ""
        axes.plot(xs, ys, color=colours[name], lw=1.8, marker=marker, ms=4, solid_joinstyle="round")
    for step in marks:
        axes.axvline(step, color=FAINT, lw=1, ls=(0, (3, 3)))
    if is_log:
        axes.set_yscale("log")
    axes.set(xlim=(0, last * 1.01), ylim=(low, high))
    _ticks(axes, last, high / low if is_log else 0)
    if max(values) > high:
        tilted = {"marker": [(-1, -0.5), (1, 0.5)], "ms": 9, "ls": "none", "clip_on": False}
        axes.plot([0, 0], [1, 0.965], transform=axes.transAxes, color=FAINT, **tilted)
        said = f"cut off: up to {number(max(values))}"
        axes.annotate(said, (0.2, 1), xycoords="axes fraction", va="top", color=FAINT, fontsize=11)
    return figure


def average(points: Points) -> list[tuple[float, float]]:
    """Return at most ``MOST_POINTS`` points: means of neighbours, and the last point unchanged."""
    group = -(-len(points) // MOST_POINTS)
    means = []
    for start in range(0, len(points), group):
        some = points[start : start + group]
        means.append((some[-1][0], sum(value for _, value in some) / len(some)))
    return [*means[:-1], points[-1]]


def _range(
    lines: Sequence[Points], values: Sequence[float], is_log: bool, from_zero: bool
) -> tuple[float, float]:
    low, high = min(values), max(values)
    if is_log:
        return low / 1.15, high * 1.15
    late = max(value for points in lines for _, value in points[len(points) // 10 :])
    if max(map(len, lines)) > 30 and high > late + 0.5 * (late - low):
        high = late + 0.1 * (late - low)
        return (min(0.0, low) if from_zero else low - 0.06 * (high - low)), high
    if from_zero:
        low = min(0.0, low)
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return (low if from_zero else low - room), high + room


def _ticks(axes: Any, last: float, ratio: float) -> None:
    """Set round numbers on both axes; ``ratio`` is highest / lowest value of a log axis, else 0."""
    from matplotlib import ticker

    steps = [x for x in ticker.MaxNLocator(5, integer=True).tick_values(0, last) if 0 <= x <= last]
    labels = [number(step) for step in steps]
    axes.set_xticks(steps, [f"step {labels[0]}", *labels[1:]])
    axes.yaxis.set_major_locator(
        _log_locator(ratio) if ratio >= 4 else ticker.MaxNLocator(5, steps=[1, 2, 5, 10])
    )
    axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: number(value))


def _log_locator(ratio: float) -> Any:
    """Return ticks at powers of ten above a ratio of 300, else at 1, 2 and 5 of each power."""
    from matplotlib import ticker

    return ticker.LogLocator(subs=(1,) if ratio > 300 else (1, 2, 5), numticks=8)


def group_plot(groups: Mapping[str, Sequence[float | None]], colours: Mapping[str, str]) -> Any:
    """Draw bars of all groups side by side at the positions 1, 2, 3 ..."""
    figure, axes = _figure(SMALL)
    width = 0.8 / len(groups)
    count = max(map(len, groups.values()))
    for index, (name, values) in enumerate(groups.items()):
        shown = [(place, value) for place, value in enumerate(values, 1) if value is not None]
        xs = [place + (index - (len(groups) - 1) / 2) * width for place, _ in shown]
        drawn = axes.bar(xs, [value for _, value in shown], width * 0.92, color=colours[name])
        if count * len(groups) <= 8:
            labels = [f"{value:.2f}" for _, value in shown]
            axes.bar_label(drawn, labels, fontsize=10, color=FAINT, padding=2)
    places = range(1, count + 1, 1 + count // 12)
    axes.set_xticks(places, [f"place {place}" if place == 1 else str(place) for place in places])
    axes.yaxis.set_major_formatter(lambda value, _: number(value))
    axes.margins(y=0.12)
    return figure


def histogram_plot(label: str, series: Mapping[str, Mapping[str, int]], scale: float = 1.0) -> Any:
    """Draw histograms over a logarithmic axis; keys are the lower ends of their bins.

    A bin ends where the next possible one begins: numbers with four leading binary digits.
    """
    figure, axes = _figure(SMALL, bottom=42)
    colours = (COLOURS[-1], COLOURS[0])[-len(series) :]
    for colour, table in zip(colours, series.values(), strict=True):
        lows = [int(low) for low in table if int(low) > 0]
        widths = [1 << max(low.bit_length() - 4, 0) for low in lows]
        heights = [table[str(low)] * low / width for low, width in zip(lows, widths, strict=True)]
        axes.bar(
            [low * scale for low in lows],
            heights,
            [width * scale for width in widths],
            align="edge",
            color=colour,
            alpha=0.75,
        )
    axes.set_xscale("log")
    axes.set_yticks([])
    axes.minorticks_off()
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(_log_locator(high / low))
    axes.xaxis.set_major_formatter(lambda value, _: number(value))
    axes.set_xlabel(label)
    return figure


def rank_plot(counts: Any) -> Any:
    """Draw how often ids occur, the most frequent first, on two logarithmic axes."""
    figure, axes = _figure(SMALL, bottom=42)
    some = sorted((int(count) for count in counts if count), reverse=True)
    axes.loglog(range(1, len(some) + 1), some, color=COLOURS[0])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: number(value))
    axes.minorticks_off()
    axes.set_xlabel("rank")
    axes.set_ylabel("occurrences")
    return figure


def _figure(size: tuple[int, int], bottom: int = 26) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            f"plots need matplotlib, which cannot be imported ({error}): pip install matplotlib"
        ) from error
    width, height = size
    figure = Figure(figsize=(width / 72, height / 72), facecolor="none")
    axes = figure.add_axes(
        (50 / width, bottom / height, 1 - 62 / width, 1 - (bottom + 12) / height)
    )
    axes.set_facecolor("none")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.tick_params(length=0, labelsize=11, labelcolor=FAINT)
    axes.yaxis.grid(color=GRID, lw=1)
    axes.set_axisbelow(True)
    axes.xaxis.label.set(size=11, color=FAINT)
    axes.yaxis.label.set(size=11, color=FAINT)
    return figure, axes


def as_svg(figure: Any, name: str, kind: str = "") -> str:
    """Return a figure as an SVG element of a page; ``name`` describes it and is unique in the
    page."""
    from html import escape

    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path.group()), svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box
    head = f'<svg {box.group()} class="{kind}" role="img" aria-label="{escape(name)}">'
    return head + svg[svg.index(">") + 1 :].strip()


def save(figure: Any, title: str, path: Path) -> None:
    """Write a figure as a PNG file."""
    figure.suptitle(title, x=0.02, y=1.06, ha="left")
    figure.savefig(path, format="png", dpi=160, facecolor="white", bbox_inches="tight")
