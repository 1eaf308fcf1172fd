"""Run by torchrun from ``measure/scale.py``: what a small twin of a run sends in a step.

    traffic_worker.py OUT.json '{"file": "...", "overrides": [...]}'

The twin has every layer of the run at a 64th of its width, and buckets of a 4,096th: it makes the
same collectives, of 4,096 times fewer bytes. ``stage3_max_reuse_distance``, which is DeepSpeed's
default in our runs, shrinks with them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from zero_worker import Collectives

from hourglass_dist.config.schema import Config, load
from hourglass_dist.core import ranks
from hourglass_dist.core.files import replace
from hourglass_dist.engine import engine
from hourglass_dist.engine.deepspeed_config import REDUCE_BUCKET, deepspeed_settings
from hourglass_dist.model.hourglass import HourglassLM
from hourglass_dist.planning import forecast
from hourglass_dist.planning import zero as formulas

NARROWER, LENGTH = 64, 256
SMALLER = NARROWER**2
PASSES = (1, 2)
SMALL_TENSORS = 100
"""Elements: all norms and biases of a twin, none of its matrices."""


def twin(file: str, overrides: Sequence[str], ranks: int, stage: int, passes: int) -> Config:
    """The small settings. Raises ValueError for a width that 64 does not divide."""
    whole = load(file, overrides)
    zero = whole.deepspeed.zero_optimization
    heads = whole.model.levels[-1].dim
    assert heads is not None
    changes = [f"model.dim={_narrow(whole.model.dim)}", f"data.seq_len={LENGTH}"]
    changes += [f"data.batch_size={passes * ranks}", "train.micro_batch_size=1"]
    changes += ["train.steps=100", "optim.warmup_steps=0", "checkpoint.every=100"]
    if whole.model.dim_head is not None:
        changes.append(f"model.dim_head={_narrow(whole.model.dim_head)}")
    for index, level in enumerate(whole.model.levels):
        if level.dim is not None and level.dim != whole.model.dim:
            changes.append(f"model.levels.{index}.dim={_narrow(level.dim)}")
        if level.window is not None:
            changes.append(f"model.levels.{index}.window={min(level.window, LENGTH // 16)}")
    block = "deepspeed.zero_optimization"
    live = zero.stage3_max_live_parameters or formulas.MAX_LIVE_PARAMETERS
    sizes = {
        "reduce_bucket_size": zero.reduce_bucket_size or REDUCE_BUCKET,
        "allgather_bucket_size": zero.allgather_bucket_size or forecast.GATHER_BUCKET,
        "stage3_prefetch_bucket_size": zero.stage3_prefetch_bucket_size or forecast.PREFETCH_BUCKET,
        "stage3_max_live_parameters": live,
    }
    changes += [f"{block}.{name}={size // SMALLER}" for name, size in sizes.items()]
    changes += [f"{block}.stage={stage}"]
    changes += [f"{block}.stage3_param_persistence_threshold={SMALL_TENSORS}"]
    group = f"{block}.zero_hpz_partition_size"
    changes += [f"{group}={(stage == 3 and zero.zero_hpz_partition_size) or 'null'}"]
    return load(file, [*(o for o in overrides if not o.startswith(group)), *changes])


def _narrow(width: int) -> int:
    if width % NARROWER:
        raise ValueError(f"--count: expected widths that {NARROWER} divides, found {width}")
    return width // NARROWER


def shrink_the_rest() -> None:
    """What no setting of ours says."""
    formulas.REUSE_DISTANCE //= SMALLER
    formulas.FLAT_COPY //= SMALLER
    distance = formulas.REUSE_DISTANCE

    def settings(config: Config, world_size: int, trained: int) -> dict[str, Any]:
        made = deepspeed_settings(config, world_size, trained)
        if config.deepspeed.stage == 3:
            made["zero_optimization"]["stage3_max_reuse_distance"] = distance
        return made

    untyped: Any = engine
    untyped.deepspeed_settings = settings


def count(config: Config, world: ranks.World) -> dict[str, Any]:
    """The third step of an engine: by then it has learned in which order it gathers."""
    if world.is_main:
        print(f"ranks: {world.size}, ZeRO-{config.deepspeed.stage}", flush=True)
    model = HourglassLM(config.model)
    model.init_weights(0)
    made = engine.Engine(model, config, world)
    passes = config.accumulation_steps(world.size)
    tokens_BL = torch.zeros(passes, LENGTH, dtype=torch.int64)
    rows = {"tokens_BL": tokens_BL, "targets_BL": tokens_BL}
    made.step(rows, 0)
    made.step(rows, 1)
    with Collectives() as collectives:
        made.step(rows, 2)
    machines = forecast.cluster("h100", 1, world.size)
    planned = forecast.forecast(config, machines)
    return {
        "ranks": world.size,
        "stage": config.deepspeed.stage,
        "passes": passes,
        "parameters": planned.plan.parameters.total,
        "sent": collectives.sent,
        "planned": planned.plan.traffic.total,
        "calls": collectives.calls,
        "calls_planned": sum(c.number for c in [*planned.calls, *planned.calls_after]),
    }


def main() -> None:
    """OUT.json, and the run as JSON: ``file``, ``overrides``, and ``cases`` to count (stage and
    passes; all of them without)."""
    torch.set_num_threads(1)
    world = ranks.init()
    run = json.loads(sys.argv[2])
    cases = run.get("cases") or [(stage, passes) for stage in (1, 2, 3) for passes in PASSES]
    shrink_the_rest()
    found = [
        count(twin(run["file"], run["overrides"], world.size, stage, passes), world)
        for stage, passes in cases
    ]
    if world.is_main:
        replace(Path(sys.argv[1]), json.dumps(found))
    ranks.shutdown()


if __name__ == "__main__":
    main()
