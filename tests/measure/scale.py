"""One run on more and more accelerators, on paper.

    python -m tests.measure.scale configs/large_zero3.yaml --ranks 64,1024

    a step         bytes and number of collectives of every ZeRO stage, seconds with their latencies
    a checkpoint   files, what one costs the file system and the store, and reading it again
    failures       how many, the best interval by formula and by a walk along simulated failures

The formulas of bytes are those of ``hourglass plan``, which ``tests.measure.zero`` counts on live
ranks; so does ``--count`` with a small twin of this very run. All else is the same on every
machine.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import typer
from ranks import numbers, on_ranks

from hourglass_dist.bench.shared import show
from hourglass_dist.config.schema import Config, load
from hourglass_dist.core.text import show_bytes
from hourglass_dist.model.hourglass import HourglassLM
from hourglass_dist.model.settings import ModelConfig
from hourglass_dist.planning.failures import (
    DAY,
    RATES,
    Return,
    Saving,
    best_interval,
    daly,
    longest_interval,
    mtbf_s,
    simulate,
    young,
)
from hourglass_dist.planning.forecast import WRITES, Forecast, cluster, forecast

GPUS_PER_NODE = 8
OPENS = 50_000.0
"""Files a second that the metadata server of a shared file system opens or makes: an assumption."""
START_S = 60.0
"""Processes, imports, communicators, the model, a first step: an assumption."""
PIECE_S = 14e-6
"""Of one core for a piece of a tensor in an index, measured on a Zen 4 core."""
QUEUE_SPREAD = 0.5
"""Of the logarithm of the time that a job waits for machines; the mean is in ``Return``."""
SAVE_OPERATIONS = 8
"""Of each rank in a checkpoint: folder, create, mode, sync, size, two reads, one removal later."""
GROUPS = 0.7
"""Shape of a Weibull distribution whose failures come in groups."""
INTERVALS_MIN = (1, 2, 5, 10, 20, 60, 180)


Report = tuple[str, list[dict[str, Any]], dict[str, str]]


class Size(NamedTuple):
    """The run on so many accelerators, at every ZeRO stage."""

    gpus: int
    rows: int
    """Of a batch: that of the settings, or one for each accelerator."""
    stages: dict[str, Forecast]
    chosen: Forecast
    """At the stage of the settings."""


class Restart(NamedTuple):
    """What reading a checkpoint takes."""

    opens: int
    """Of files, by all ranks: each looks into each."""
    headers: int
    """Bytes of these that leave the file system, once for every node."""
    seconds: float
    """With start of the processes and two reads of the data: one verifies, one loads."""


def bench_scale(
    file: Path,
    overrides: Sequence[str],
    gpu: str,
    ranks: Sequence[int],
    failures: int,
    seed: int,
    count: Sequence[int] = (),
) -> list[dict[str, Any]]:
    """Compute, print and return the rows of all tables, the first of them of live ranks when there
    is something to ``count``. Raises ValueError for settings or numbers of ranks that cannot be."""
    found: list[dict[str, Any]] = []
    counted = [_counted(file, overrides, count)] if count else []
    for title, rows, columns in counted + reports(file, overrides, gpu, ranks, failures, seed):
        show(title, rows, columns)
        found += [{"table": title} | row for row in rows]
    return found


def reports(
    file: Path, overrides: Sequence[str], gpu: str, ranks: Sequence[int], failures: int, seed: int
) -> list[Report]:
    """The tables, each a title, rows, and what stands above each column with its format."""
    sizes = [size_of(file, overrides, gpu, gpus) for gpus in ranks]
    return [
        _steps(sizes),
        _checkpoints(sizes),
        _failures(sizes, failures, seed),
        _intervals(sizes[-1], failures, seed),
    ]


def size_of(file: Path, overrides: Sequence[str], gpu: str, gpus: int) -> Size:
    """The run of a settings file on so many accelerators, its batch as large as it must be."""
    if gpus % GPUS_PER_NODE:
        raise ValueError(
            f"--ranks: expected multiples of {GPUS_PER_NODE}, the GPUs of a node, given {gpus}"
        )
    config, machines = load(file, overrides), cluster(gpu, gpus // GPUS_PER_NODE, GPUS_PER_NODE)
    rows = config.data.batch_size
    if gpus * config.train.micro_batch_size > rows:
        rows = gpus * config.train.micro_batch_size
        config = load(file, [*overrides, f"data.batch_size={rows}"])
    stages = {str(stage): forecast(at_stage(config, stage), machines) for stage in (1, 2, 3)}
    chosen = forecast(config, machines)
    if group := config.deepspeed.group_size(gpus):
        stages[f"3, hpZ {group}"] = chosen
    return Size(gpus, rows, stages, chosen)


def at_stage(config: Config, stage: int) -> Config:
    """The same run at another ZeRO stage, nothing kept twice."""
    update = {"stage": stage, "zero_hpz_partition_size": None}
    zero = config.deepspeed.zero_optimization.model_copy(update=update)
    engine = config.deepspeed.model_copy(update={"zero_optimization": zero})
    return config.model_copy(update={"deepspeed": engine})


def _counted(file: Path, overrides: Sequence[str], count: Sequence[int]) -> Report:
    rows: list[dict[str, Any]] = []
    for ranks in count:
        arguments = json.dumps({"file": str(file), "overrides": list(overrides)})
        rows += on_ranks(ranks, "traffic_worker.py", arguments)
    for row in rows:
        row["apart"] = row["sent"] / row["planned"] - 1
    columns = {"ranks": "{ranks}", "stage": "{stage}", "passes": "{passes}"}
    columns |= {"bytes sent": "{sent:,.0f}", "planned": "{planned:,.0f}", "apart": "{apart:+.2%}"}
    columns |= {"calls": "{calls:,}", "calls planned": "{calls_planned:,}"}
    return f"A step of a twin of {rows[0]['parameters']:,} parameters, counted", rows, columns


# --- a step --------------------------------------------------------------------------------------


def _steps(sizes: Sequence[Size]) -> Report:
    rows: list[dict[str, Any]] = []
    speeds: dict[str, float] = {}
    for size in sizes:
        for stage, made in size.stages.items():
            speed = made.tokens_per_day / size.gpus
            ideal = made.plan.traffic.total / made.cluster.bandwidth
            wires = made.collectives_s + made.optimizer_s
            rows.append(
                {
                    "gpus": size.gpus,
                    "stage": stage,
                    "rows": size.rows,
                    "each": size.rows // size.gpus,
                    "sent": made.plan.traffic.total / 1e9,
                    "calls": sum(c.number for c in [*made.calls, *made.calls_after]),
                    "products": made.products_s,
                    "ideal": ideal,
                    "wires": wires,
                    "step": made.step_s,
                    "speed": speed / speeds.setdefault(stage, speed),
                }
            )
    columns = {"GPUs": "{gpus:,}", "stage": "{stage}", "rows": "{rows:,}", "each": "{each}"}
    columns |= {"GB sent": "{sent:,.1f}", "calls": "{calls:,}", "products s": "{products:.2f}"}
    columns |= {"bytes s": "{ideal:.2f}", "+ latency s": "{wires:.2f}", "step s": "{step:.2f}"}
    columns |= {"of a GPU": "{speed:.0%}"}
    made = sizes[0].chosen
    title = f"A step of {made.plan.parameters.total:,} parameters on {made.cluster.device.name}"
    return title, rows, columns


# --- a checkpoint --------------------------------------------------------------------------------


@cache
def index_of(model: ModelConfig) -> tuple[int, int]:
    """Pieces in the index of a rank's file, and about how many bytes long it is, for a model:
    three pieces of each trained tensor, and all shapes."""
    with torch.device("meta"):
        made = HourglassLM(model)
    names = [name for name, _ in made.named_parameters()]
    return 3 * len(names), sum(3 * (len(name) + 80) + len(name) + 18 for name in names)


def restart(made: Forecast) -> Restart:
    """Reading the newest checkpoint of a run with the same number of ranks."""
    gpus, nodes = made.cluster.gpus, made.cluster.nodes
    pieces, length = index_of(made.plan.config.model)
    opens, headers = gpus * gpus, nodes * gpus * length
    reads = 2 * made.plan.checkpoint_bytes + headers
    looking = gpus * pieces * PIECE_S
    return Restart(opens, headers, START_S + opens / OPENS + reads / WRITES + looking)


def _checkpoints(sizes: Sequence[Size]) -> Report:
    rows = []
    for size in sizes:
        made, again = size.chosen, restart(size.chosen)
        rows.append(
            {
                "gpus": size.gpus,
                "files": size.gpus + 1,
                "each": show_bytes(made.plan.checkpoint_bytes // size.gpus),
                "stall": 1e3 * made.saving.stall_s,
                "write": made.saving.write_s,
                "operations": SAVE_OPERATIONS * size.gpus,
                "notes": 3 * size.gpus,
                "opens": again.opens,
                "headers": show_bytes(again.headers),
                "seconds": again.seconds,
            }
        )
    columns = {"GPUs": "{gpus:,}", "files": "{files:,}", "of a rank": "{each}"}
    columns |= {"stall ms": "{stall:.1f}", "write s": "{write:.1f}"}
    columns |= {"file calls": "{operations:,}", "store calls": "{notes:,}"}
    columns |= {"a start: opens": "{opens:,}", "indexes": "{headers}", "start s": "{seconds:,.0f}"}
    whole = show_bytes(sizes[0].chosen.plan.checkpoint_bytes)
    return f"A checkpoint of {whole}, at {WRITES / 1e9:.0f} GB/s", rows, columns


# --- failures ------------------------------------------------------------------------------------


def coming_back(made: Forecast) -> Return:
    """What lies between a failure and the next step."""
    return Return(queue_spread=QUEUE_SPREAD, start_s=restart(made).seconds)


def _failures(sizes: Sequence[Size], failures: int, seed: int) -> Report:
    rows = []
    for name, rate in RATES.items():
        for size in sizes:
            made, back = size.chosen, coming_back(size.chosen)
            mtbf, saving = mtbf_s(size.gpus, rate), size.chosen.saving
            whole = Saving(saving.stall_s + saving.write_s, 0.0)  # training waits for all of it
            now = made.plan.config.checkpoint.every * made.step_s
            walks = [
                simulate(interval, kind, back, mtbf, failures=failures, seed=seed)
                for interval, kind in (
                    (daly(whole.stall_s, mtbf), whole),
                    (best_interval(saving, back, mtbf), saving),
                    (longest_interval(saving, back, mtbf), saving),
                    (now, saving),
                )
            ]
            rows.append(
                {
                    "where": f"{size.gpus:,}, {name}",
                    "week": 7 * DAY / mtbf,
                    "hours": mtbf / 3600,
                    "young": young(whole.stall_s, mtbf) / 60,
                    "daly": daly(whole.stall_s, mtbf) / 60,
                    "best": best_interval(saving, back, mtbf) / 60,
                    "longest": longest_interval(saving, back, mtbf) / 60,
                    "now": now / 60,
                    "lost": walks[3].lost_s / 60,
                    **{f"walk{n}": walk.goodput for n, walk in enumerate(walks)},
                }
            )
    columns = {"GPUs, rate": "{where}", "a week": "{week:.2f}", "apart h": "{hours:,.1f}"}
    columns |= {"Young": "{young:.1f}", "Daly": "{daly:.1f}", "goodput": "{walk0:.2%}"}
    columns |= {"async": "{best:.1f}", "goodput ": "{walk1:.2%}"}
    columns |= {"or": "{longest:.1f}", "goodput  ": "{walk2:.2%}"}
    columns |= {"as set": "{now:.1f}", "goodput   ": "{walk3:.2%}", "lost": "{lost:.1f}"}
    return (
        "Failures: intervals, and what one loses, in minutes; goodput as simulated",
        rows,
        columns,
    )


def _intervals(size: Size, failures: int, seed: int) -> Report:
    made, back = size.chosen, coming_back(size.chosen)
    saving = made.saving
    whole = Saving(saving.stall_s + saving.write_s, 0.0)
    limit = made.plan.config.run.time_limit_hours
    limit_s = 3600 * limit if limit else None
    rows: list[dict[str, Any]] = []
    for minutes in INTERVALS_MIN:
        row: dict[str, Any] = {"minutes": minutes}
        for name, rate in RATES.items():
            for kind in ("sync", "async", "groups", "limit"):
                walk = simulate(
                    60.0 * minutes,
                    whole if kind == "sync" else saving,
                    back,
                    mtbf_s(size.gpus, rate),
                    failures=failures,
                    shape=GROUPS if kind == "groups" else 1.0,
                    limit_s=limit_s if kind == "limit" else None,
                    seed=seed,
                )
                row[f"{key_of(name)}_{kind}"] = walk.goodput
                row[f"{key_of(name)}_{kind}_lost"] = walk.lost
        rows.append(row)
    columns, blank = {"every min": "{minutes}"}, ""
    for name in RATES:
        for kind in ("sync", "async", "async_lost", "groups", "limit"):
            title = f"{name}: sync" if kind == "sync" else kind.replace("async_", "") + blank
            columns[title] = f"{{{key_of(name)}_{kind}:.2%}}"
        blank += " "
    return f"Goodput on {size.gpus:,} GPUs, and what of it is lost", rows, columns


def key_of(name: str) -> str:
    """A name that a format may hold."""
    return name.replace(" ", "_").replace("-", "_")


def main(
    config: Path,
    overrides: list[str] = [],  # noqa: B006
    gpu: str = "h100",
    ranks: str = "64,256,512,1024,4096",
    failures: int = 3000,
    seed: int = 0,
    count: str = "",
) -> None:
    """Print the tables; ``count``: on how many CPU ranks to count the traffic of a twin, too."""
    live = numbers(count) if count else []
    bench_scale(config, overrides, gpu, numbers(ranks), failures, seed, live)


if __name__ == "__main__":
    typer.run(main)
