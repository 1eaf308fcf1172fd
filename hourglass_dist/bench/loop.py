"""``hourglass bench loop``: a step of training beside a step of the same model in a bare loop."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hourglass_dist.bench.shared import on_ranks, ratio, show
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

    Raises ValueError when the settings or ranks fail, or their dataset is not there.
    """
    open_mixture(load(config, overrides).data)
    rows = []
    for count in ranks:
        flops = plan(load(config, overrides), count)
        operations = flops.tokens_per_step * flops.cost.hardware_flops_per_token
        found = on_ranks(
            *(count, "hourglass_dist.bench.loop_worker"),
            *(str(steps + WARM_UP + 1), str(config), *overrides),
        )
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
