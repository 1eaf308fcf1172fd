"""Run by torchrun from test_evaluation.py: trains several runs, one after another.

evaluation_worker.py '[["CONFIG.yaml", "key=value", ...], ...]'
"""

from __future__ import annotations

import contextlib
import json
import sys

from hourglass_dist import train
from hourglass_dist.config import schema
from hourglass_dist.core.stop import Interrupted

for name, *overrides in json.loads(sys.argv[1]):
    with contextlib.suppress(Interrupted):
        train.train(schema.load(name, overrides))
