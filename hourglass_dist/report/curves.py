"""Charts of a run: which metrics are drawn together, and their readable names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hourglass_dist.pages import html, plots
from hourglass_dist.pages.plots import COLOURS, INK, Points, css, number
from hourglass_dist.report.run import Run


@dataclass(frozen=True)
class Chart:
    """Contents of one chart."""

    title: str
    names: tuple[str, ...]
    """Names of metrics; ``prefix/*`` means all metrics of a group."""
    note: str = ""
    is_log: bool = False
    from_zero: bool = False


LEARNING = (
    Chart("Loss", ("heldout/loss", "train/loss"), "nats per token"),
    Chart("Held out, by source", ("heldout/*/bits_per_byte",), "bits per byte"),
    Chart("Learning rate", ("train/lr",), from_zero=True),
    Chart("Gradient norm", ("train/grad_norm",), "before clipping", is_log=True),
    Chart("Passes over each source", ("data/*/epochs",), "epochs", from_zero=True),
)
INSIDE = (
    Chart("Gradient norm by level", ("grad_norm/*",), is_log=True),
    Chart("Update / weight", ("update_ratio/*",), "norm of a step / norm of weights", is_log=True),
    Chart("Norm of the weights", ("param_norm/*",), is_log=True),
    Chart("Activations", ("activation_rms/*",), "RMS of the output of a level"),
    Chart("Largest logit", ("logits/largest",), "absolute", from_zero=True),
    Chart("Word starts without a bucket", ("train/missed_buckets",), "share", from_zero=True),
)
SPEED = (
    Chart("Speed", ("train/tokens_per_second",), "tokens per second, all ranks", from_zero=True),
    Chart("Share of peak FLOP/s", ("train/mfu", "train/hfu"), from_zero=True),
    Chart("Operations", ("train/tflops_per_second_per_rank",), "TFLOP/s per rank", from_zero=True),
    Chart("Waiting for data", ("train/data_wait",), "share of the time", from_zero=True),
    Chart("Own time of ranks", ("ranks/seconds_*",), "seconds a step, without waiting",
          from_zero=True),
    Chart("Memory", ("memory/*",), "of the rank that takes most", from_zero=True),
    Chart("Pauses",
          ("time/checkpoint_seconds", "time/evaluation_seconds", "time/samples_seconds"),
          "seconds each", from_zero=True),
    Chart("Goodput", ("train/goodput",), "time in steps that count / time since the first start",
          from_zero=True),
)  # fmt: skip

READABLE = {
    "train/loss": "training",
    "train/bits_per_byte": "training",
    "heldout/loss": "held out",
    "heldout/bits_per_byte": "held out",
    "train/lr": "learning rate",
    "train/grad_norm": "all parameters",
    "train/missed_buckets": "share",
    "train/data_wait": "share",
    "train/tokens_per_second": "tokens per second",
    "train/tflops_per_second_per_rank": "TFLOP/s",
    "train/mfu": "of the model (MFU)",
    "train/hfu": "with recomputation (HFU)",
    "ranks/seconds_min": "fastest rank",
    "ranks/seconds_median": "median",
    "ranks/seconds_max": "slowest rank",
}


def curves(run: Run, charts: Sequence[Chart]) -> str:
    """Return, as HTML, the charts whose metrics have values."""
    return html.grid([draw(run, chart, {"": plots.SMALL}) for chart in charts])


def draw(run: Run, chart: Chart, sizes: Mapping[str, tuple[int, int]]) -> str:
    """Return a chart as HTML in every size, of which the page shows one; "" without values."""
    if chart.title == "Loss" and are_bytes(run):
        return ""  # the same curve in another unit
    asked = {name: run.metrics[name] for name in matching(run.metrics, chart.names)}
    series = {readable(name): points for name, points in distinct(asked).items()}
    if not series:
        return ""
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(series)}
    for name in series:
        if name.startswith("level "):
            colours[name] = COLOURS[int(name.removeprefix("level ")) % 7]
    colours |= {"embeddings, output": COLOURS[7], "all": INK}
    note = chart.note
    if chart.names[0].startswith("memory/"):
        series, unit = in_one_unit(series)
        note = f"{unit}, {note}"
    marks = [entry["step"] for entry in run.starts[1:]]
    drawn = [
        plots.as_svg(
            plots.line_plot(
                series,
                colours,
                size=size,
                is_log=chart.is_log,
                from_zero=chart.from_zero,
                marks=marks,
                last_x=run.step,
            ),
            f"{chart.title} {kind}".strip(),
            kind,
        )
        for kind, size in sizes.items()
    ]
    legend = {name: (css(colours[name]), number(points[-1][1])) for name, points in series.items()}
    return html.figure(chart.title, note, "".join(drawn), legend)


def are_bytes(run: Run) -> bool:
    """Return whether tokens are bytes (or end-of-text ids): the score is then the loss in bits."""
    tokens, size = run.last("train/tokens_per_second"), run.last("train/bytes_per_second")
    return bool(tokens and size and 0.9 < size / tokens <= 1)


def distinct(series: Mapping[str, Points]) -> dict[str, Points]:
    """Return the series without those whose points all equal an earlier one's."""
    kept: dict[str, Points] = {}
    for name, points in series.items():
        if points not in kept.values():
            kept[name] = points
    return kept


def in_one_unit(series: Mapping[str, Points]) -> tuple[dict[str, Points], str]:
    """Return series of bytes in the largest unit in which their maximum is at least 1, and it."""
    highest = max(value for points in series.values() for _, value in points)
    power, unit = next(
        (power, unit)
        for power, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB"), (0, "bytes"))
        if highest >= 1 << power or not power
    )
    scaled: dict[str, Points] = {
        name: [(step, value / (1 << power)) for step, value in points]
        for name, points in series.items()
    }
    return scaled, unit


def matching(metrics: Mapping[str, Points], names: Sequence[str]) -> list[str]:
    """Return the metrics that ``names`` match, those of a group in alphabetical order."""
    chosen = []
    for name in names:
        start, star, end = name.partition("*")
        if star:
            parts = name.count("/")
            chosen += [
                other
                for other in sorted(metrics)
                if other.startswith(start) and other.endswith(end) and other.count("/") == parts
            ]
        elif name in metrics:
            chosen.append(name)
    return chosen


def readable(name: str) -> str:
    """Return the readable name of a metric."""
    rest = name.partition("/")[2]
    for end in ("/bits_per_byte", "/epochs", "_bytes", "_seconds"):
        rest = rest.removesuffix(end)
    rest = "embeddings, output" if rest == "ends" else rest.replace("_", " ")
    return READABLE.get(name, rest)


def positions(run: Run) -> str:
    """Return charts of the score by offset in a bucket: the first and the newest evaluation for
    each stride."""
    by_stride: dict[int, dict[int, list[float | None]]] = defaultdict(dict)
    for entry in run.positions:
        by_stride[int(entry["stride"])][int(entry["step"])] = entry["bits_per_byte"]
    figures = []
    for stride, of_step in sorted(by_stride.items()):
        steps = sorted({min(of_step), max(of_step)})
        groups = {f"step {step:,}": of_step[step] for step in steps}
        colours = dict(zip(groups, (COLOURS[7], COLOURS[0])[-len(groups) :], strict=True))
        title = f"Buckets of {stride}"
        image = plots.as_svg(plots.group_plot(groups, colours), title)
        legend = {name: (css(colour), "") for name, colour in colours.items()}
        figures.append(html.figure(title, "bits per byte", image, legend))
    return html.grid(figures)
