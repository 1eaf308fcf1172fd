"""Run by torchrun from test_engine.py: makes a model as a run does, at stage 3 and at stage 1, and
writes how much of it was on this rank at most, whether both have the same weights, and how many
ranks will keep a second copy of each.

    meta_worker.py OUT.json CONFIG
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import nn

from hourglass_dist import train
from hourglass_dist.config import schema as settings
from hourglass_dist.core import ranks
from hourglass_dist.engine import engine

world = ranks.init()
sizes = []
making = engine.making_weights


def watched(config, world):
    made = making(config, world)

    def here(module: nn.Module):
        model = models[-1]
        sizes.append(sum(p.numel() for p in model.parameters() if not p.is_meta))
        return made(module)

    return here


models = []
build = train.HourglassLM
train.HourglassLM = lambda config: models.append(build(config)) or models[-1]
train.making_weights = watched
zero = "deepspeed.zero_optimization"
config = settings.load(sys.argv[2], [f"{zero}={{stage: 3, zero_hpz_partition_size: 2}}"])
shared = train.make_model(config, world)
most = max(sizes)
whole = train.make_model(settings.load(sys.argv[2], [f"{zero}.stage=1"]), world)
same, groups = True, set()
for part, full in zip(shared.parameters(), whole.parameters(), strict=True):
    size = part.partition_numel()
    flat = torch.zeros(size * world.size)
    flat[: full.numel()] = full.detach().flatten()
    groups.add(part.ds_secondary_tensor_group_size)
    same &= torch.equal(part.ds_tensor, flat[world.rank * size : (world.rank + 1) * size])
if world.is_main:
    total = sum(p.numel() for p in whole.parameters())
    found = {"most": most, "total": total, "same": same, "groups": list(groups)}
    Path(sys.argv[1]).write_text(json.dumps(found))
