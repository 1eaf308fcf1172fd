"""Watcher that ends hung ranks from outside: a thread in torchrun's own process on every node.

Each rank reports regularly that it is alive, and for how long it may be silent from then on. It
sends a datagram, so neither a slow file system nor a changed clock can make a rank look dead. When
a rank is silent for longer

    the stacks of all ranks of this node go to RUN/stacks/, by py-spy, which can read a process that
    is stopped or holds Python's lock; where py-spy is not permitted, by a signal to the rank;
    ranks that are still silent a moment later get SIGKILL, which also ends a stopped process.

torchrun then restarts all ranks, or ends. Ranks on other nodes wait for the one that hangs, so the
watchers there do the same at about the same time.
"""

from __future__ import annotations

import ctypes
import json
import os
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from hourglass_dist.health.heartbeat import process_state

VARIABLE = "HOURGLASS_WATCHER"
"""Name of the environment variable that holds the name of the watcher's socket."""
STACKS_SIGNAL = signal.SIGUSR2
"""Signal on which a rank writes its own stacks."""
KEPT = 3
"""Number of files with stacks of earlier hangs that are kept for each rank."""
PY_SPY_SECONDS = 15
MARGIN = 60.0
"""Time that a watcher has to do all of this before a rank ends itself, seconds."""


class WatcherClient:
    """Client in a rank that tells the watcher that the rank is alive."""

    def __init__(self, rank: int, stacks: Path) -> None:
        """Connect to the watcher, if any; ``stacks`` is the file for this rank's stacks."""
        self._about = {"rank": rank, "stacks": str(stacks.resolve())}
        name = os.environ.get(VARIABLE)
        self.is_watched = name is not None
        self._address = f"\0{name}"
        if self.is_watched:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._socket.setblocking(False)
            with suppress(OSError, AttributeError):  # where Linux lets only parents trace
                ctypes.CDLL(None).prctl(_PR_SET_PTRACER, os.getppid())

    def report(self, step: int, limit: float | None) -> None:
        """Report that this rank has done ``step`` steps and may be silent for ``limit`` seconds;
        None ends the watch."""
        if self.is_watched:
            message = json.dumps({**self._about, "step": step, "limit": limit}).encode()
            with suppress(OSError):  # the watcher is gone, or busy
                self._socket.sendto(message, self._address)


_PR_SET_PTRACER = 0x59616D61


@dataclass
class _Rank:
    """Last report of a rank to the watcher."""

    rank: int
    stacks: Path
    step: int
    limit: float
    heard: float
    """Time of the last report by the watcher's monotonic clock, seconds."""


class Watcher(threading.Thread):
    """Thread that watches the ranks that this process has started."""

    def __init__(self) -> None:
        super().__init__(name="watcher", daemon=True)
        self._ranks: dict[int, _Rank] = {}
        self.ended: set[int] = set()
        """Process ids of ranks that got SIGKILL because they hung."""
        name = f"hourglass-{os.getpid()}-{secrets.token_hex(8)}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind(f"\0{name}")  # an abstract socket: no file, gone with this process
        os.environ[VARIABLE] = name

    def run(self) -> None:
        while True:
            self._listen(0.25)
            if silent := self._silent():
                self._end(silent)

    def _listen(self, seconds: float) -> None:
        """Receive reports for ``seconds``. The kernel names the sender; only children count."""
        ends = time.monotonic() + seconds
        while (left := ends - time.monotonic()) > 0:
            self._socket.settimeout(left)
            try:
                message, extra, *_ = self._socket.recvmsg(4096, socket.CMSG_SPACE(12))
            except TimeoutError:
                return
            pid = struct.unpack("3i", extra[0][2])[0]
            if (process_state(pid) or ("", 0))[1] != os.getpid():
                continue
            report = json.loads(message)
            if report["limit"] is None:
                self._ranks.pop(pid, None)
            else:
                about = report["rank"], Path(report["stacks"]), report["step"], report["limit"]
                self._ranks[pid] = _Rank(*about, heard=time.monotonic())

    def _silent(self) -> list[int]:
        """Return the processes that have been silent for longer than their limit."""
        for pid in [pid for pid in self._ranks if process_state(pid) is None]:
            del self._ranks[pid]
        now = time.monotonic()
        return [pid for pid, rank in self._ranks.items() if now - rank.heard > rank.limit]

    def _end(self, silent: Sequence[int]) -> None:
        """Write the stacks of all ranks, then kill those that are still silent."""
        begun = time.monotonic()
        first = self._ranks[silent[0]]
        which = ", ".join(str(self._ranks[pid].rank) for pid in silent[:8])
        say(
            f"rank {which} on {socket.gethostname()}: no sign of life for {first.limit:,.0f} s, "
            f"after step {first.step}; the stacks of this node's ranks go to {first.stacks.parent}"
        )
        with ThreadPoolExecutor(8) as several:
            list(several.map(self._write_stacks, list(self._ranks)))
        self._listen(min(5.0, first.limit / 4))  # the other nodes' watchers are not done yet
        for pid, rank in list(self._ranks.items()):
            if rank.heard < begun:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    self.ended.add(pid)
                del self._ranks[pid]

    def _write_stacks(self, pid: int) -> None:
        rank = self._ranks[pid]
        state = process_state(pid)
        if state is None:
            return
        stopped = state[0] in "Tt"
        title = (
            f"{time.strftime('%Y-%m-%d %H:%M:%S')}: rank {rank.rank} on {socket.gethostname()}, "
            f"process {pid}{', which is stopped' if stopped else ''}, after step {rank.step}: "
            f"silent for {time.monotonic() - rank.heard:.1f} s"
        )
        stacks = py_spy(pid, stopped)
        with suppress(OSError), rank.stacks.open("a") as file:
            file.write(f"{title}\n{stacks or 'py-spy cannot read it; what it writes itself:'}\n")
        if not stacks:
            with suppress(ProcessLookupError):
                os.kill(pid, STACKS_SIGNAL)
                os.kill(pid, signal.SIGCONT)
            time.sleep(1.0)


def py_spy(pid: int, stopped: bool) -> str:
    """Return the stacks of all threads of a process; "" when they cannot be read."""
    beside = Path(sys.executable).with_name("py-spy")
    program = str(beside) if beside.exists() else shutil.which("py-spy")
    # py-spy fails when it tries to pause a process that is stopped already
    ways = [["--nonblocking"]] if stopped else [[], ["--nonblocking"]]
    for way in ways if program else []:
        with suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(
                [str(program), "dump", "--pid", str(pid), *way],
                capture_output=True,
                text=True,
                timeout=PY_SPY_SECONDS,
                check=True,
            )
            return done.stdout
    return ""


@contextmanager
def watching() -> Iterator[Watcher | None]:
    """Watch the ranks that are started inside this context; yield None where the system cannot
    tell who sent a report (it is not Linux): there ranks end themselves."""
    if not hasattr(socket, "SO_PASSCRED"):
        yield None
        return
    watcher = Watcher()
    watcher.start()
    yield watcher


def open_stacks(run: Path, rank: int) -> Path:
    """Create the empty file for a rank's stacks and return its path. The last ``KEPT`` files of
    earlier hangs are kept under the time of their writing."""
    path = run / "stacks" / f"rank_{rank:05d}.txt"
    path.parent.mkdir(exist_ok=True, parents=True)
    if path.exists() and path.stat().st_size:
        written = time.strftime("%Y%m%d-%H%M%S", time.localtime(path.stat().st_mtime))
        path.rename(path.with_name(f"{path.stem}_{written}.txt"))
        for old in sorted(path.parent.glob(f"{path.stem}_*.txt"))[:-KEPT]:
            old.unlink(missing_ok=True)
    path.touch()
    return path


def say(line: str) -> None:
    """Print a line on stderr."""
    print(line, file=sys.stderr, flush=True)
