"""SIGKILLs at random moments, each time another number of ranks: the run consumes exactly the rows
that an undisturbed one does.

    python -m tests.measure.stream_kills --kills 30 --steps 600 --seed 1
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from stream_drill import drill


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as temporary:
        print(drill(Path(temporary) / "drill", options.kills, options.steps, options.seed))


if __name__ == "__main__":
    main()
