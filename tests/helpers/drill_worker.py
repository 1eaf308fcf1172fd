"""The training program, which also notes which rows each optimizer step consumed.

drill_worker.py ROWS_FOLDER CONFIG.yaml key=value ...
"""

from __future__ import annotations

import json
import os
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

from hourglass_dist import train
from hourglass_dist.data.batch import Batch
from hourglass_dist.engine.engine import StepResult
from hourglass_dist.training import metrics


class Recorder(metrics.Metrics):
    """Metrics that append a line a step to a file of this process."""

    def record(
        self,
        step: int,
        result: StepResult,
        batch: Batch,
        epochs: Callable[[int], dict[str, float]],
        skipped: int,
    ) -> None:
        """Note the rows of this rank and a checksum of what they held."""
        if not hasattr(self, "_file"):
            self._file = (FOLDER / f"{os.environ['LAUNCH']}-{os.environ['RANK']}").open("w")
        line = {
            "step": step,
            "rows": batch.row_ids.tolist(),
            "content": [zlib.crc32(row.numpy().tobytes()) for row in batch.targets_BL],
        }
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        super().record(step, result, batch, epochs, skipped)


if __name__ == "__main__":
    FOLDER = Path(sys.argv[1])
    train.Metrics = Recorder  # type: ignore[misc]
    sys.exit(train.main(sys.argv[2:]))
