"""Trains on the nodes of a hostfile, over plain ssh; nothing but this checkout is needed on them.

    python launch/ssh.py hostfile configs/base_zero2.yaml run.dir=/shared/runs/base

A line ``HOST slots=RANKS`` for each node; all see this folder under the same path and are reached
without a password. See hourglass_dist/launch/ssh.py.
"""

import sys
from pathlib import Path

# the code beside this file, also where another checkout, or none, is installed
sys.path[0] = str(Path(__file__).parents[1])
from hourglass_dist.launch.ssh import main  # noqa: E402

sys.exit(main(sys.argv[1:]))
