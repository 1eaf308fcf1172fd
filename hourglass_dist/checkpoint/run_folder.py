"""The folder of a run: its settings, and the lock of the process that trains.

runs/NAME/
    config.yaml                the resolved settings; see MAY_CHANGE
    tokenizer/                 a copy, so that the run can be exported without its dataset
    lock                       held by the process that trains in this folder
    metrics.jsonl, events.*    written by training/metrics.py
    checkpoints/               written by save.py
"""

from __future__ import annotations

import os
import re
import socket
from contextlib import ExitStack
from pathlib import Path

from hourglass_dist.config.loader import ConfigError, differences, to_yaml
from hourglass_dist.config.schema import Config, load
from hourglass_dist.core.files import file_lock, replace
from hourglass_dist.data.tokenizer import Tokenizer

MAY_CHANGE = re.compile(
    r"run\.dir|run\.time_limit_hours|run\.hang_minutes|run\.max_fruitless_starts|"
    r"data\.dataset|data\.sources\.\d+\.path|data\.cache\.|data\.skip_shards|"
    r"train\.micro_batch_size|train\.max_skipped_steps|train\.compile|deepspeed\.|eval\.|"
    r"checkpoint\.|metrics\.|model\.levels\.\d+\.activation_checkpointing"
)
"""Settings that may change on resume: they decide where and how the run trains, not what it learns.
(A dataset is identified by its id, not its path; the data state records skipped shards.)"""


class RunFolder:
    """The folder of a run, locked by one process while it trains."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self._lock = ExitStack()

    def open(self, config: Config) -> None:
        """Take the lock and compare the settings with those of the run's first start.

        Raises ValueError when another process trains in this folder, or when a setting differs that
        decides what the run learns.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        written = self.path / "config.yaml"
        changed = differences(load(written), config) if written.exists() else []
        refused = [change for change in changed if not MAY_CHANGE.match(change)]
        if refused:
            self.close()
            raise ConfigError(
                f"{self.path}: this run was started with other settings ({'; '.join(refused)}); "
                "start the new ones elsewhere with run.dir=..."
            )

    def record(self, config: Config, tokenizer: Tokenizer) -> None:
        """Write the settings and the tokenizer into the folder."""
        (self.path / "tokenizer").mkdir(exist_ok=True)
        tokenizer.save(self.path / "tokenizer")
        replace(self.path / "config.yaml", to_yaml(config))

    def _take_lock(self) -> None:
        path = self.path / "lock"
        holder = path.read_text().strip() if path.exists() else ""
        busy = f"{self.path}: {holder or 'another process'} is training in this folder"
        descriptor = self._lock.enter_context(file_lock(path, busy=busy))
        os.truncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())

    def close(self) -> None:
        """Release the lock, as the end of this process also does."""
        self._lock.close()
