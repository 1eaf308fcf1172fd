"""History of a run, its starts and how each one ended: ``RUN/history.jsonl``.

    {"event": "start", "time": 1770000000.0, "step": 500, "ranks": 8, "device": "NVIDIA H100 ...",
     "host": "node0", "versions": {"torch": "2.13.0", ...}, "revision": "c688d1e"}
    {"event": "end", "time": 1770003600.0, "step": 1000, "reason": "finished", "crashed": false}

``time`` is in seconds since 1970, ``step`` the number of steps done. A killed process writes no
end, so a start that follows a start means a kill. A run that crashes again and again before it
saves anything new is refused after a few starts: ``records.require_progress``.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from hourglass_dist.core import ranks
from hourglass_dist.core.records import HISTORY_FILE, append_jsonl, read_history
from hourglass_dist.core.stop import Interrupted
from hourglass_dist.core.version import __version__


class History:
    """Context manager that records the start and the end of this process in the history.

    Only the main rank writes. On exit the end is recorded if the start was.
    """

    def __init__(self, run: Path) -> None:
        self._path = run / HISTORY_FILE
        self._is_open = False
        self.step = 0
        """Number of steps done so far, updated by the caller."""
        self.first_start = time.time()
        """Time of the first start of the run, seconds since 1970."""

    def start(self, step: int, world: ranks.World) -> None:
        """Record that this process continues after ``step`` steps."""
        self.step = step
        if not world.is_main:
            return
        known = read_history(self._path.parent)
        device = device_name(world.device)
        now = self._add("start", ranks=world.size, device=device, **about_this_code())
        self._is_open = True
        self.first_start = min(entry["time"] for entry in [*known, now])

    def _add(self, event: str, **facts: Any) -> dict[str, Any]:
        entry: dict[str, Any] = {"event": event, "time": time.time(), "step": self.step, **facts}
        with suppress(OSError):  # a full disk must not end the run
            append_jsonl(self._path, entry)
        return entry

    def __enter__(self) -> History:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._is_open:
            first_line = (str(error).splitlines() or [""])[0]
            if kind is None:
                reason = "finished"
            elif issubclass(kind, Interrupted):
                reason = first_line.partition(";")[0]
            else:
                reason = f"{kind.__name__}: {first_line}"[:500]
            no_crash = (Interrupted, KeyboardInterrupt, ValueError, OSError)
            crashed = kind is not None and not issubclass(kind, no_crash)
            self._add("end", reason=reason, crashed=crashed)


def about_this_code() -> dict[str, Any]:
    """Return host, package versions and code revision of this process."""
    return {
        "host": socket.gethostname(),
        "versions": {
            "hourglass_dist": __version__,
            "torch": version("torch"),
            "deepspeed": version("deepspeed"),
        },
        "revision": revision(),
    }


def device_name(device: torch.device) -> str:
    """Return the accelerator's name, or ``cpu``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@cache
def revision() -> str | None:
    """Return the commit of this checkout, or the one that the container image was built from; None
    if unknown."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return os.environ.get("HOURGLASS_REVISION") or None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
