"""A step of training, with stream, checks and metrics, beside a step of a bare loop of the same
model: DeepSpeed's engine alone, and on one rank PyTorch alone.

    python -m tests.measure.loop configs/quickstart.yaml --steps 50
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from ranks import numbers, on_ranks

from hourglass_dist.bench.shared import ratio, show
from hourglass_dist.config.schema import load
from hourglass_dist.data.mixture import open_mixture
from hourglass_dist.planning.plan import plan

WARM_UP = 5
"""Steps that do not count."""


def bench_loop(
    config: Path, overrides: Sequence[str], ranks: Sequence[int], steps: int
) -> list[dict[str, Any]]:
    """Measure, print and return the rows: the time of a step, and how much of a training step is
    not spent in DeepSpeed's engine, which says more than a ratio on a busy machine.
    """
    open_mixture(load(config, overrides).data)
    rows = []
    for count in ranks:
        made = plan(load(config, overrides), count, "cpu")
        operations = made.tokens_per_step * made.flops.hardware_per_token
        found = on_ranks(count, "loop_worker.py", steps + WARM_UP + 1, config, *overrides)
        seconds = {name: taken[WARM_UP:] for name, taken in found["seconds"].items()}
        for name, taken in seconds.items():
            median = statistics.median(taken)
            rows.append(
                {
                    "name": f"{count}: {name}",
                    "ms": 1e3 * median,
                    "mean": 1e3 * statistics.mean(taken),
                    "over": ratio(seconds["training"], taken),
                    "flops": operations / median / 1e9,
                    "outside": "",
                }
            )
        outside = statistics.median(found["outside"][WARM_UP:])
        share = outside / statistics.median(seconds["training"])
        rows[-len(seconds)]["outside"] = f"{1e3 * outside:,.1f} ms, {share:.1%}"
    show(
        f"{config}: {steps} steps of each, in turn",
        rows,
        {
            "ranks": "{name}",
            "ms a step": "{ms:,.1f}",
            "mean": "{mean:,.1f}",
            "training / this": "{over:.3f}",
            "GFLOP/s": "{flops:,.1f}",
            "outside the engine": "{outside}",
        },
    )
    return rows


def main(config: Path, overrides: list[str] = [], ranks: str = "1,2", steps: int = 100) -> None:  # noqa: B006
    """Print the table of settings with a dataset that is there."""
    bench_loop(config, overrides, numbers(ranks), steps)


if __name__ == "__main__":
    typer.run(main)
