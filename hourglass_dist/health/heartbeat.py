"""Heartbeat files of the ranks, for ``hourglass status``: ``RUN/heartbeats/rank_00003.json``.

    {"time": 1770000000.0, "rank": 3, "ranks": 8, "host": "node0", "pid": 4711,
     "space": "pid:[4026531836]", "doing": "training", "step": 500, "seconds": 0.31, "loss": 1.93,
     "limit": 600.0}

``time`` is in seconds since 1970, ``step`` the number of steps done, ``seconds`` the time of the
last one, ``loss`` its loss (main rank only), ``limit`` the seconds for which the rank may be
silent. A run that ends by itself removes these files; a killed run leaves them.
"""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

FOLDER = "heartbeats"


@dataclass(frozen=True)
class Heartbeat:
    """Last report of a rank."""

    time: float
    rank: int
    ranks: int
    host: str
    pid: int
    space: str
    """Process namespace of ``pid``: see ``process_space``."""
    doing: str
    step: int
    seconds: float | None
    loss: float | None
    limit: float

    @property
    def where(self) -> str:
        """Rank and host as text, such as ``rank 3 (node0)``."""
        return f"rank {self.rank} ({self.host})"


def pause_between(ranks: int) -> float:
    """Return the seconds between two writes of a rank: more with more ranks, to spare the disk."""
    return max(5.0, ranks / 100)


class HeartbeatFile:
    """Heartbeat file of this rank, rewritten every few seconds without a thread."""

    def __init__(self, run: Path, rank: int, ranks: int, step: int, limit: float) -> None:
        """Write the first heartbeat, after ``step`` steps. The main rank removes files of an
        earlier start with more ranks."""
        self._folder = run / FOLDER
        self._path = self._folder / _name(rank)
        self._unfinished = self._path.with_name(f".{self._path.name}.unfinished")
        self._written = time.monotonic()
        host = socket.gethostname()
        self._beat = Heartbeat(
            time=time.time(),
            rank=rank,
            ranks=ranks,
            host=host,
            pid=os.getpid(),
            space=process_space(),
            doing="starting",
            step=step,
            seconds=None,
            loss=None,
            limit=limit,
        )
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            for other in read_heartbeats(run) if rank == 0 else ():
                if other.rank >= ranks:
                    (self._folder / _name(other.rank)).unlink(missing_ok=True)
        self._write()

    def beat(
        self, doing: str, step: int, seconds: float | None, loss: float | None, limit: float
    ) -> None:
        """Report what this rank does; a change is written at once, the rest every few seconds."""
        new = (doing, limit) != (self._beat.doing, self._beat.limit)
        self._beat = replace(
            self._beat, doing=doing, step=step, seconds=seconds, loss=loss, limit=limit
        )
        often = min(pause_between(self._beat.ranks), limit / 4)
        if new or time.monotonic() - self._written > often:
            self._written = time.monotonic()
            self._write()

    def _write(self) -> None:
        """Write the file atomically without a sync: it is not needed after a machine crash."""
        self._beat = replace(self._beat, time=time.time())
        with suppress(OSError):  # a full disk ends no run
            self._unfinished.write_text(json.dumps(asdict(self._beat)))
            self._unfinished.rename(self._path)

    def close(self) -> None:
        """Remove the file, when the rank ends by itself."""
        with suppress(OSError):
            self._path.unlink(missing_ok=True)
            self._unfinished.unlink(missing_ok=True)
            self._folder.rmdir()  # succeeds on the last rank


def _name(rank: int) -> str:
    return f"rank_{rank:05d}.json"


def read_heartbeats(run: Path) -> list[Heartbeat]:
    """Return the last heartbeat of every rank, in rank order, without files that are unreadable."""
    heartbeats = []
    names = {field.name for field in fields(Heartbeat)}
    for path in sorted((run / FOLDER).glob("rank_*.json")):
        with suppress(OSError, ValueError, TypeError):
            entry = json.loads(path.read_text())
            heartbeats.append(Heartbeat(**{name: entry[name] for name in names & entry.keys()}))
    return heartbeats


def process_space() -> str:
    """Return Linux's name of the process namespace, one per container; "" on other systems."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def process_state(pid: int) -> tuple[str, int] | None:
    """Return the state letter of a process on this machine (T: stopped) and its parent's id; None
    when the process is gone, a zombie, or the system has no /proc."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, parent = text.rpartition(")")[2].split()[:2]
    return None if state in "ZX" else (state, int(parent))
