"""The training program, every rank in a folder of its own: elsewhere_worker.py FOLDER ARGUMENTS."""

from __future__ import annotations

import os
import sys

from hourglass_dist import train

if __name__ == "__main__":
    os.chdir(os.path.join(sys.argv[1], os.environ["RANK"]))
    sys.exit(train.main(sys.argv[2:]))
