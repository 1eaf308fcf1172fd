"""Run by torchrun from test_level_stats.py: trains the small model and writes its level
stats.

level_stats_worker.py OUT.json '[{"stage": 1, "precision": "fp32", "watch": true}, ...]'
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from toy import make_batch, make_config, make_model

from hourglass_dist.core import ranks
from hourglass_dist.engine.engine import Engine
from hourglass_dist.training.level_stats import LevelStats

STEPS = 3


def run(case: dict[str, Any], world: ranks.World) -> dict[str, Any]:
    config = make_config(case["stage"], case.get("precision", "fp32"))
    engine = Engine(make_model(config), config, world)
    level_stats = LevelStats(engine)
    losses, seen = [], []
    size = config.data.batch_size // world.size
    for step in range(STEPS):
        tokens, targets = make_batch(step, config)
        share = slice(world.rank * size, (world.rank + 1) * size)
        rows = {"tokens_BL": tokens[share], "targets_BL": targets[share]}
        with level_stats.collecting(case["watch"]):
            result = engine.step(rows, step)
        assert level_stats.own_seconds() > 0
        losses.append(result.loss)
        found = ranks.gather_floats(level_stats.local_sums(), world.device)
        seen.append(level_stats.metrics(found, result.grad_norm) | {"all": result.grad_norm})
    return {"losses": losses, "seen": seen}


def main() -> None:
    out, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    world = ranks.init()
    results = [run(case, world) for case in cases]
    if world.is_main:
        out.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
