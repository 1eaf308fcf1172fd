"""SIGKILLs at the worst moments: the weights in the end are those of an undisturbed run.

python -m tests.measure.kills --kills 40 --steps 60 --seed 1
python -m tests.measure.kills --broken     the same with a rename that is not atomic: it fails
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from kill_drill import drill
from paths import CORPUS, HELPERS
from ranks import hourglass
from tiny_run import TINY


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--broken", action="store_true")
    given = parser.parse_args()
    if given.broken:
        os.environ["DRILL_WORKER"] = str(HELPERS / "careless_worker.py")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tiny.yaml").write_text(TINY)
        made = hourglass(
            "data", "shard", CORPUS, "--out", folder / "data", "--held-out", "last:0.1"
        )
        assert made.returncode == 0, made.stderr
        for stage in (1, 2, 3):
            share = (given.kills + 3 - stage) // 3
            (folder / str(stage)).mkdir()
            done, wrong = drill(
                *(folder / str(stage), folder / "tiny.yaml", folder / "data"),
                *(stage, share, given.steps, given.seed + stage),
            )
            print(f"ZeRO {stage}: {done.total()} kills; differences: {wrong or 'none'}", flush=True)
            for what, times in sorted(done.items()):
                print(f"    {times} x {what}")


if __name__ == "__main__":
    main()
