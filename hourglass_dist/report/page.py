"""A run as one HTML page that can be mailed: no network, no scripts, and everything escaped.

Reads what the run folder holds, of a run that goes on too. ``config.yaml`` and ``metrics.jsonl``
must be there; ``history.jsonl``, ``skipped.jsonl``, ``samples.jsonl``, ``positions.jsonl`` and
``profile/table.txt`` may be.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from hourglass_dist.config.loader import to_yaml
from hourglass_dist.config.schema import Config, load
from hourglass_dist.core.files import replace
from hourglass_dist.core.records import read_history, read_jsonl
from hourglass_dist.planning.plan import plan, render
from hourglass_dist.report.charts import CLIP, line_chart, number
from hourglass_dist.report.diagram import label, stacks
from hourglass_dist.report.report_style import STYLE

NEWEST_SAMPLES, LISTED = 6, 30
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Run:
    """What a run folder says."""

    path: Path
    config: Config
    metrics: dict[str, Points]
    """(step, value) of every metric, in order of steps."""
    history: list[dict[str, Any]]
    skipped: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    positions: list[dict[str, Any]]
    profile: str
    """The table of a profile; empty when none was made."""

    @property
    def step(self) -> int:
        """The last one that was recorded."""
        return int(max((points[-1][0] for points in self.metrics.values()), default=0))

    @property
    def starts(self) -> list[dict[str, Any]]:
        """One entry for each time that the run was started."""
        return [entry for entry in self.history if entry["event"] == "start"]

    def last(self, name: str) -> float | None:
        """The newest value of a metric."""
        points = self.metrics.get(name)
        return points[-1][1] if points else None


def read_run(path: Path) -> Run:
    """Read a run folder. Raises ValueError when it holds no run or nothing is recorded yet."""
    if not (path / "metrics.jsonl").exists():
        raise ValueError(f"{path}: no metrics.jsonl: expected the folder of a run that has begun")
    metrics: dict[str, Points] = defaultdict(list)
    for record in read_jsonl(path / "metrics.jsonl"):
        for name, value in record.items():
            if name != "step":
                metrics[name].append((record["step"], value))
    table = path / "profile" / "table.txt"
    return Run(
        path=path,
        config=load(path / "config.yaml"),
        metrics=dict(metrics),
        history=read_history(path),
        skipped=read_jsonl(path / "skipped.jsonl"),
        samples=read_jsonl(path / "samples.jsonl"),
        positions=read_jsonl(path / "positions.jsonl"),
        profile=table.read_text() if table.exists() else "",
    )


def write_report(run: Path, out: Path) -> None:
    """Write the page. Raises ValueError as ``read_run`` does."""
    replace(out, page(read_run(run)))


def page(run: Run) -> str:
    """The report."""
    title = escape(f"{run.path.resolve().name}: {run.config.model.hierarchy}")
    sections = {
        "": headline(run) + picture(run.config),
        "Learning": curves(run, LEARNING),
        "Inside the model": curves(run, INSIDE),
        "Speed and memory": curves(run, SPEED),
        "Where the time goes": _pre(run.profile) if run.profile else "",
        "Starts": starts(run),
        "Skipped steps": skipped(run),
        "Samples": samples(run),
        "Held-out score by place in a bucket": positions(run),
        "Plan": _pre(render(plan(run.config, _ranks(run)))),
        "Settings": f'<div class="settings">{_pre(to_yaml(run.config))}</div>',
    }
    body = "".join(
        f"<section>{f'<h2>{escape(name)}</h2>' if name else ''}{content}</section>"
        for name, content in sections.items()
        if content
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head>"
        f"<body>{CLIP}<main>{body}</main></body></html>\n"
    )


# --- the top -------------------------------------------------------------------------------------


def headline(run: Run) -> str:
    """Name, state, and the figures that everybody wants."""
    config, step = run.config, run.step
    parameters = plan(config, _ranks(run)).cost.parameters
    held_out = [value for _, value in run.metrics.get("heldout/bits_per_byte", ())]
    goodput, speed = run.last("train/goodput"), run.last("train/tokens_per_second")
    loss, mfu = run.last("train/bits_per_byte"), run.last("train/mfu")
    cards = {
        "parameters": number(parameters),
        "steps": f"{step:,} of {config.train.steps:,}",
        "tokens": number(config.data.tokens(step)),
        "held-out bits/byte": f"{held_out[-1]:.4f}" if held_out else None,
        "best held out": f"{min(held_out):.4f}" if held_out else None,
        "training bits/byte": f"{loss:.4f}" if loss is not None else None,
        "tokens/s": number(speed) if speed is not None else None,
        "MFU": f"{mfu:.1%}" if mfu is not None else None,
        "goodput": f"{goodput:.1%}" if goodput is not None else None,
        "restarts": str(max(0, len(run.starts) - 1)) if run.starts else None,
    }
    boxes = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in cards.items()
        if value is not None
    )
    return (
        f'<header><h1>{escape(run.path.resolve().name)}</h1><p class="state">{escape(state(run))}'
        f"</p></header><dl>{boxes}</dl>"
    )


def state(run: Run) -> str:
    """``4@1 8@3 4@1, 8 x NVIDIA H100, bf16, ZeRO-2: finished``."""
    config = run.config
    where = f"{run.starts[-1]['ranks']} x {run.starts[-1]['device']}, " if run.starts else ""
    about = (
        f"{config.model.hierarchy}, {where}{config.train.precision}, ZeRO-{config.deepspeed.stage}"
    )
    if not run.history:
        return about
    last = run.history[-1]
    ending = last["reason"] if last["event"] == "end" else "no end noted: it runs, or was killed"
    return f"{about}: {ending}"


def picture(config: Config) -> str:
    """The hourglass: a bar for each stack of layers, as long as its sequence is."""
    rows = [
        f'<p><i><b style="width:{100 / stack.stride:.2f}%;background:var(--c{stack.level % 7})">'
        f"</b></i><span>{escape(label(stack))}</span></p>"
        for stack in stacks(config.model)
    ]
    return f'<div class="hourglass">{"".join(rows)}</div>'


# --- curves --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chart:
    """What one chart shows."""

    title: str
    names: tuple[str, ...]
    """Metrics; ``prefix/*`` is all of a group."""
    note: str = ""
    is_log: bool = False
    from_zero: bool = False


LEARNING = (
    Chart("Bits per byte", ("train/bits_per_byte", "heldout/bits_per_byte")),
    Chart("Loss", ("train/loss", "heldout/loss"), "nats per token"),
    Chart("Held out, by source", ("heldout/*/bits_per_byte",), "bits per byte"),
    Chart("Learning rate", ("train/lr",), from_zero=True),
    Chart("Gradient norm", ("train/grad_norm",), "before clipping", is_log=True),
    Chart("Reading of sources", ("data/*/epochs",), "epochs", from_zero=True),
)
INSIDE = (
    Chart("Gradient norm by level", ("grad_norm/*",), is_log=True),
    Chart("Update / weight", ("update_ratio/*",), "norm of a step / norm of weights", is_log=True),
    Chart("Weights", ("param_norm/*",), "norm", is_log=True),
    Chart("Activations", ("activation_rms/*",), "RMS of what leaves a level"),
    Chart("Largest logit", ("logits/largest",), "absolute", from_zero=True),
    Chart("Buckets without room", ("train/missed_buckets",), "share", from_zero=True),
)
SPEED = (
    Chart("Speed", ("train/tokens_per_second",), "of all ranks, per second", from_zero=True),
    Chart("Use of the peak", ("train/mfu", "train/hfu"), from_zero=True),
    Chart("Operations", ("train/tflops_per_second_per_rank",), "TFLOP/s of a rank", from_zero=True),
    Chart("Waiting for data", ("train/data_wait",), "share of the time", from_zero=True),
    Chart("Own time of ranks", ("ranks/*",), "seconds a step, data and forward", from_zero=True),
    Chart("Memory", ("memory/*",), "bytes, of the rank that takes most", from_zero=True),
    Chart("Pauses",
          ("time/checkpoint_seconds", "time/evaluation_seconds", "time/samples_seconds"),
          "seconds", from_zero=True),
    Chart("Goodput", ("train/goodput",), "time of steps that count / time since the first start",
          from_zero=True),
)  # fmt: skip


def curves(run: Run, charts: Iterable[Chart]) -> str:
    """The charts for which there are numbers."""
    marks = [entry["step"] for entry in run.starts[1:]]
    colours = {f"level {n}": f"var(--c{n % 7})" for n in range(len(run.config.model.levels))}
    colours |= {_readable("grad_norm/ends"): "var(--c7)", "all": "var(--ink)"}
    drawn = [
        line_chart(
            chart.title,
            {_readable(name): run.metrics[name] for name in _matching(run.metrics, chart.names)},
            note=chart.note,
            is_log=chart.is_log,
            from_zero=chart.from_zero,
            marks=marks,
            last_x=run.step,
            colours=colours,
        )
        for chart in charts
    ]
    return f'<div class="charts">{"".join(drawn)}</div>' if any(drawn) else ""


def _matching(metrics: Mapping[str, Points], names: Sequence[str]) -> list[str]:
    found = []
    for name in names:
        start, star, end = name.partition("*")
        if star:
            parts = len(name.split("/"))
            found += [
                other
                for other in sorted(metrics)
                if other.startswith(start) and other.endswith(end) and other.count("/") + 1 == parts
            ]
        elif name in metrics:
            found.append(name)
    return found


def _readable(name: str) -> str:
    group, _, rest = name.partition("/")
    if group in ("train", "heldout", "data") and "/" not in rest:
        short = {"train": "training", "heldout": "held out"}.get(group, group)
        is_shared = rest in ("loss", "bits_per_byte")
        rest = short if is_shared else rest.replace("_per_second_per_rank", "/s")
    rest = rest.removesuffix("/bits_per_byte").removesuffix("/epochs")
    rest = rest.removesuffix("_seconds").removesuffix("_per_second").removeprefix("seconds_")
    return "embeddings, output" if rest == "ends" else rest.replace("_", " ")


# --- tables and texts ----------------------------------------------------------------------------


def starts(run: Run) -> str:
    """When the run was started, on what, and how each start ended."""
    rows = []
    for index, entry in enumerate(run.history):
        if entry["event"] != "start":
            continue
        after = run.history[index + 1] if index + 1 < len(run.history) else None
        end = after if after and after["event"] == "end" else None
        ending = end["reason"] if end else ("killed" if after else "no end noted")
        versions = ", ".join(f"{name} {text}" for name, text in entry["versions"].items())
        rows.append(
            [
                _utc(entry["time"]),
                f"{entry['ranks']} x {entry['device']} ({entry['host']})",
                f"{entry['step']:,}",
                f"{end['step']:,}" if end else "",
                _duration(end["time"] - entry["time"]) if end else "",
                ending,
                f"{versions}, revision {entry['revision']}" if entry["revision"] else versions,
            ]
        )
    names = ["start (UTC)", "ranks", "from step", "to step", "took", "end", "code"]
    return _table(names, rows)


def skipped(run: Run) -> str:
    """Steps whose loss or gradient was no number."""
    rows = [
        [f"{entry['step']:,}", str(entry.get("loss", "")), " to ".join(map(str, entry["rows"]))]
        for entry in run.skipped[-LISTED:]
    ]
    more = len(run.skipped) - len(rows)
    note = f"<p>{more:,} earlier ones are not listed.</p>" if more else ""
    return _table(["step", "loss", "rows of the data"], rows) + note


def samples(run: Run) -> str:
    """The newest texts that the model wrote."""
    shown = [
        f"<article><small>step {int(each['step']):,}</small><p><b>{escape(str(each['prompt']))}</b>"
        f"{escape(str(each['text']).removeprefix(str(each['prompt'])))}</p></article>"
        for each in reversed(run.samples[-NEWEST_SAMPLES:])
    ]
    return f'<div class="samples">{"".join(shown)}</div>' if shown else ""


def positions(run: Run) -> str:
    """How the score depends on the place in a bucket: of each stride the first and the newest
    evaluation."""
    by_stride: dict[int, dict[int, Points]] = defaultdict(dict)
    for entry in run.positions:
        places = enumerate(entry["bits_per_byte"], start=1)
        points = [(float(place), value) for place, value in places if value is not None]
        by_stride[int(entry["stride"])][int(entry["step"])] = points
    charts = [
        line_chart(
            f"Buckets of {stride}",
            {f"step {step:,}": of_step[step] for step in sorted({min(of_step), max(of_step)})},
            note="bits per byte",
            of_x="place",
        )
        for stride, of_step in sorted(by_stride.items())
    ]
    return f'<div class="charts">{"".join(charts)}</div>' if charts else ""


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _pre(text: str) -> str:
    return f'<div class="wide"><pre>{escape(text)}</pre></div>'


def _ranks(run: Run) -> int:
    return int(run.starts[-1]["ranks"]) if run.starts else 1


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}"
