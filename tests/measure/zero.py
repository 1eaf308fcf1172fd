"""Memory of a rank and what it sends, as measured on CPU ranks beside ``hourglass plan``:

    python -m tests.measure.zero --ranks 2 --stages 2,3

One torchrun for each number of ranks; ``zero_worker.py`` is what the ranks run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import typer
from ranks import numbers, on_ranks

from hourglass_dist.bench.shared import show

LAYERS = 94
"""Of width 64 at the inner level: 4.8 M parameters."""
HELD_WITHIN, SENT_WITHIN = 0.03, 0.02


def bench_zero(
    ranks: Sequence[int],
    stages: Sequence[int],
    precisions: Sequence[str],
    accumulation: Sequence[int],
    layers: int = LAYERS,
) -> list[dict[str, Any]]:
    """Measure, print and return the rows."""
    cases = [
        {"stage": s, "precision": p, "accumulation": list(accumulation), "layers": layers}
        for s, p in product(stages, precisions)
    ]
    rows = [row for count in ranks for row in _measure(count, cases)]
    table(rows, accumulation)
    return rows


def _measure(ranks: int, cases: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = on_ranks(ranks, "zero_worker.py", json.dumps(cases))
    return rows


def difference(row: Mapping[str, Any], name: str) -> float:
    """Of the measured figure from the planned one, as a share of the latter."""
    measured, planned = row["measured"][name], row["planned"][name]
    return (measured - planned) / planned if planned else float(measured > row["parameters"] / 100)


def table(rows: Sequence[Mapping[str, Any]], accumulation: Sequence[int]) -> None:
    """Bytes of a parameter, measured / planned, and how far apart they are at the worst."""
    sent = [f"sent {n}" for n in sorted(accumulation)]
    held = ["weights", "gradients", "master", "moments"]
    shown = []
    for row in rows:
        per = {name: row["measured"][name] / row["parameters"] for name in [*held, *sent, "moment"]}
        plan = {name: row["planned"][name] / row["parameters"] for name in per}
        cells = {name: f"{per[name]:.2f}/{plan[name]:.2f}" for name in per}
        worst = max((difference(row, name) for name in [*held, *sent]), key=abs)
        where = f"{row['stage']} {row['precision']} {row['ranks']}"
        shown.append({"where": where, "worst": worst, **cells})
    columns = {"stage, ranks": "{where}"} | {name: f"{{{name}}}" for name in held}
    columns |= {name: f"{{{name}}}" for name in sent}
    columns |= {"on top": "{moment}", "worst": "{worst:+.2%}"}
    show(
        "Bytes of a parameter on one rank, measured/planned, sent in steps of "
        f"{' and '.join(map(str, sorted(accumulation)))} micro batches; "
        f"{rows[0]['parameters']:,} parameters",
        shown,
        columns,
    )


def main(
    ranks: str = "1,2,4",
    stages: str = "0,1,2,3",
    precisions: str = "fp32,bf16",
    accumulation: str = "1,4",
) -> None:
    """Print the table; every option is a list with commas."""
    bench_zero(numbers(ranks), numbers(stages), precisions.split(","), numbers(accumulation))


if __name__ == "__main__":
    typer.run(main)
