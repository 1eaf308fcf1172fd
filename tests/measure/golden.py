"""Writes ``tests/golden`` anew: ``python -m tests.measure.golden``. The commit says why."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from golden_runs import GOLDEN, RUNS, processor, run
from paths import CORPUS
from ranks import hourglass


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        cut = ("--held-out", "last:0.1", "--block-tokens", 16384, "--shard-blocks", 4)
        made = hourglass("data", "shard", CORPUS, "--out", data, *cut)
        assert made.returncode == 0, made.stderr
        for name in RUNS:
            golden = {"processor": processor(), "losses": run(name, data, Path(folder))}
            (GOLDEN / f"{name}.json").write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
