"""The plots of reports and of ``hourglass data stats``."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_COLOURS = ("#9aa7bd", "#2f6fde")


def _figure(height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, height), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def bars(title: str, values: Mapping[str, int]) -> Any:
    """Horizontal bars with their numbers, the first on top."""
    figure, axes = _figure(1.0 + 0.28 * max(len(values), 2))
    drawn = axes.barh(list(values), list(values.values()), color=_COLOURS[1])
    axes.bar_label(drawn, [f" {value:,}" for value in values.values()], fontsize=8)
    axes.invert_yaxis()
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.margins(x=0.18)
    axes.tick_params(axis="y", labelsize=8)
    axes.set_title(title, loc="left", fontsize=11)
    return figure


def histogram_plot(
    title: str, label: str, series: Mapping[str, Mapping[str, int]], scale: float = 1.0
) -> Any:
    """Histograms over a logarithmic axis; keys are the lower ends of their bins.

    A bin ends where the next possible one begins: numbers with four leading binary digits.
    """
    figure, axes = _figure(3.4)
    for colour, (name, table) in zip(_COLOURS[-len(series) :], series.items(), strict=False):
        lows = [int(low) for low in table if int(low) > 0]
        widths = [1 << max(low.bit_length() - 4, 0) for low in lows]
        heights = [table[str(low)] * low / width for low, width in zip(lows, widths, strict=True)]
        axes.bar(
            [low * scale for low in lows], heights, [width * scale for width in widths],
            align="edge", color=colour, alpha=0.75, label=name,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yticks([])
    axes.set_xlabel(label, fontsize=9)
    axes.set_ylabel("documents per decade", fontsize=9)
    axes.set_title(title, loc="left", fontsize=11)
    if len(series) > 1:
        axes.legend(frameon=False, fontsize=8)
    return figure


def rank_plot(title: str, counts_V: Any) -> Any:
    """How often ids occur, the most frequent first, on two logarithmic axes."""
    figure, axes = _figure(3.4)
    counts = sorted((int(count) for count in counts_V if count), reverse=True)
    axes.loglog(range(1, len(counts) + 1), counts, color=_COLOURS[1])
    axes.set_xlabel("rank", fontsize=9)
    axes.set_ylabel("occurrences", fontsize=9)
    axes.set_title(title, loc="left", fontsize=11)
    return figure


def as_image(figure: Any) -> str:
    """A figure as the source of an image in a page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def save(figure: Any, path: Path) -> None:
    """Write a figure as a PNG file."""
    figure.savefig(path, format="png")
