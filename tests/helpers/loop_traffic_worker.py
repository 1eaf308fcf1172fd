"""Run by torchrun: a training, and what each of its steps sends outside of the engine.

loop_traffic_worker.py OUT.json CONFIG.yaml key=value ...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from zero_worker import Collectives

from hourglass_dist import train
from hourglass_dist.config import schema
from hourglass_dist.core import ranks
from hourglass_dist.core.stop import StopRequests
from hourglass_dist.engine.engine import Engine

torch.set_num_threads(1)
world = ranks.init()
collectives = Collectives()
steps: list[dict[str, float]] = []
inside = [0.0, 0.0]
engine_step, reason = Engine.step, StopRequests.reason
last = [0.0, 0.0]


def counted_step(*args: Any) -> Any:
    calls, sent = collectives.calls, collectives.sent
    result = engine_step(*args)
    inside[0] += collectives.calls - calls
    inside[1] += collectives.sent - sent
    return result


def counted_reason(*args: Any) -> Any:
    """The last thing that a step does."""
    found = reason(*args)
    now = [collectives.calls - inside[0], collectives.sent - inside[1]]
    steps.append({"calls": now[0] - last[0], "sent": now[1] - last[1]})
    last[:] = now
    return found


Engine.step = counted_step  # type: ignore[method-assign]
StopRequests.reason = counted_reason  # type: ignore[method-assign]
with collectives:
    train.train(schema.load(sys.argv[2], sys.argv[3:]))
if world.is_main:
    Path(sys.argv[1]).write_text(json.dumps(steps))
ranks.leave(0)
