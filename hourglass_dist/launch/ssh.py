"""Starts launch/torchrun.sh on every host of a hostfile over ssh, and monitors it.

    python -m hourglass_dist.launch.ssh HOSTFILE CONFIG key=value ...

    a host or its connection is lost     started there again as soon as it answers
    the rendezvous node stays away       the others start again without it, where min_nodes allows
    this program gets a signal           all hosts save and stop: exit code 75
    this program is killed               all hosts save and stop: launch/lifeline.sh notices

The output of a host is shown after its name. Needs only this package and OpenSSH.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import FrameType

from hourglass_dist.config.shipped import LAUNCH
from hourglass_dist.core.exit_codes import BAD_INPUT, DONE, STOPPED
from hourglass_dist.launch.hostfile import read_hostfile

SSH = [
    *("ssh", "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=15"),
    *("-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=8"),
]
SSH_FAILED = 255
"""Exit code of ssh when the connection failed or was lost."""
NODE_VARIABLES = (
    *("NPROC_PER_NODE", "MASTER_PORT", "JOIN_TIMEOUT", "NETWORK_INTERFACE", "MAX_RESTARTS"),
    *("SHUTDOWN_TIMEOUT", "HOURGLASS_PROGRAM", "VIRTUAL_ENV", "CUDA_VISIBLE_DEVICES"),
)
PREFIXES = ("NCCL_", "GLOO_", "TORCH_", "OMP_", "PYTHON", "UCX_", "FI_")
"""Prefixes of further variables of this process that are passed to the hosts."""
SIGN_OF_LIFE, RETRY, SETTLED = 5.0, 10.0, 30.0
"""Seconds between keep-alive bytes, between attempts at a lost host, until it counts as back."""


class Host:
    """A host, and the ssh process that runs torchrun.sh there, if there is one."""

    def __init__(self, name: str, ssh: Sequence[str]) -> None:
        self.name, self._ssh = name, ssh
        self.lost_at: float | None = None
        """Time at which the host was lost, seconds of time.monotonic; None: it is not lost."""
        self.reason = ""
        """Last line of ssh's standard error."""
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        self._tried = self._told = 0.0

    def start(self, command: str) -> None:
        """Run ``command`` on the host; ssh has its own session, so that Ctrl-C does not end it."""
        self._tried = time.monotonic()
        self._process = subprocess.Popen(
            [*self._ssh, self.name, command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._show, args=[self._process], daemon=True)
        self._reader.start()

    def _show(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout
        for line in process.stdout:
            tell(f"{self.name}: {line.decode(errors='replace').rstrip()}")

    def live(self) -> bool:
        """Return whether ssh still runs, and send the host a keep-alive byte when one is due."""
        if self._process is None or self._process.poll() is not None:
            return False
        if time.monotonic() - self._tried > SETTLED:
            self.lost_at = None
        if time.monotonic() - self._told > SIGN_OF_LIFE and self._process.stdin:
            self._told = time.monotonic()
            with suppress(OSError, ValueError):
                self._process.stdin.write(b"\n")
                self._process.stdin.flush()
        return True

    def ended(self) -> int | None:
        """Return the exit code of an ssh that has ended since the last call, or None."""
        if self._process is None or self.live():
            return None
        code = self._process.returncode
        if self._reader:
            self._reader.join(timeout=5)
        if self._process.stderr:
            self.reason = last_line(self._process.stderr.read().decode(errors="replace"))
        self._process = None
        return code

    @property
    def is_there(self) -> bool:
        """Whether an ssh process runs, or has ended without ``ended`` having reported it."""
        return self._process is not None

    def is_due(self) -> bool:
        """Return whether it is time to try a lost host again."""
        return self._process is None and time.monotonic() - self._tried > RETRY

    def let_go(self) -> None:
        """Close ssh's input, after which the ranks on the host save and end."""
        if self._process and self._process.stdin:
            with suppress(OSError):
                self._process.stdin.close()

    def kill(self) -> None:
        """Kill the ssh process on this machine."""
        if self._process and self._process.poll() is None:
            self._process.kill()


class Launcher:
    """The launcher of a run on all its hosts."""

    def __init__(
        self, hosts: Sequence[Host], slots: int, arguments: Sequence[str], passed: Sequence[str]
    ) -> None:
        """Take hosts, ranks per host, arguments and further variables to be ``passed`` to hosts."""
        self.hosts, self._slots, self._arguments = list(hosts), slots, list(arguments)
        self._passed = {*NODE_VARIABLES, *passed}
        fewest = os.environ.get("NNODES", "").partition(":")[0] or str(len(hosts))
        self.fewest = min(int(fewest), len(hosts))
        self._restarts = int(os.environ.get("MAX_RESTARTS", "0"))
        self._save_seconds = int(os.environ.get("SHUTDOWN_TIMEOUT", "300"))
        self._join_seconds = int(os.environ.get("JOIN_TIMEOUT", "600"))
        self._stop_asked = False
        self._ends_since: float | None = None
        self._codes: list[int] = []
        self._last_loss = -math.inf
        self._attempt = 0
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, number: int, _: FrameType | None) -> None:
        if not self._stop_asked:
            tell(f"{signal.Signals(number).name}: all hosts save and stop")
        self._stop_asked = True

    def run(self) -> int:
        """Run until the run has ended, and return its exit code."""
        while True:
            code = self._once()
            was_lost = time.monotonic() - self._last_loss < self._join_seconds + 60
            if self._stop_asked or not was_lost or code in (DONE, BAD_INPUT) or self._restarts <= 0:
                return code
            self._restarts -= 1
            self.hosts.sort(key=lambda host: host.lost_at is not None)
            tell(f"starting again; all meet on {self.hosts[0].name}")

    def _once(self) -> int:
        """Start on all hosts, on lost ones when they come back, and return the exit code."""
        self._attempt += 1
        self._codes, self._ends_since = [], None
        for host in self.hosts:
            if host.lost_at is None:
                host.start(self._command())
        while any(host.is_there for host in self.hosts) or self._is_waiting():
            for host in self.hosts:
                code = host.ended()
                if code is not None:
                    self._look(host, code)
                elif host.lost_at is not None and host.is_due() and self._is_waiting():
                    host.start(self._command())
            if self._codes or self._stop_asked:
                self._end()
            time.sleep(0.1)
        return outcome(self._codes, self._stop_asked)

    def _is_waiting(self) -> bool:
        """Return whether there are lost hosts that are still waited for."""
        lost = [host.lost_at for host in self.hosts if host.lost_at is not None]
        is_running = any(host.is_there for host in self.hosts if host.lost_at is None)
        recently = time.monotonic() - max(lost, default=-math.inf) < self._join_seconds
        return not self._codes and not self._stop_asked and bool(lost) and (is_running or recently)

    def _look(self, host: Host, code: int) -> None:
        """Handle the exit code of a host's torchrun.sh, or of the ssh to it."""
        is_over = bool(self._codes) or self._stop_asked
        if (code == SSH_FAILED or code > 128) and not is_over:
            if host.lost_at is not None:  # one more attempt in vain
                return
            if self._restarts > 0:
                self._restarts -= 1
                host.lost_at = self._last_loss = time.monotonic()
                words = host.reason or f"torchrun ended with exit code {code}"
                tell(f"{host.name}: {words}: trying again every {RETRY:.0f} s")
                return
        if code == SSH_FAILED:
            tell(f"{host.name}: {host.reason or 'no connection'}")
        self._codes.append(code)

    def _end(self) -> None:
        """End all hosts: at once after a failure or a signal, 60 s after the first is done."""
        self._ends_since = self._ends_since or time.monotonic()
        seconds = time.monotonic() - self._ends_since
        for host in self.hosts:
            if self._stop_asked or any(self._codes) or seconds > 60:
                host.let_go()
            if seconds > self._save_seconds + 120:
                host.kill()

    def _command(self) -> str:
        """Return the shell command that a host runs."""
        names = [host.name for host in self.hosts]
        nodes = str(len(names)) if self.fewest == len(names) else f"{self.fewest}:{len(names)}"
        passed = {
            name: value
            for name, value in os.environ.items()
            if name in self._passed or name.startswith(PREFIXES)
        }
        master = names[0].rpartition("@")[2]
        passed |= {
            "NNODES": nodes,
            "NPROC_PER_NODE": str(self._slots),
            "MASTER_ADDR": os.environ.get("MASTER_ADDR", master),
            "JOB_ID": f"{os.getpid()}.{self._attempt}",
            "NODE_NAMES": " ".join(name.rpartition("@")[2] for name in names),
        }
        words = [
            *("bash", str(LAUNCH / "lifeline.sh"), str(self._save_seconds + 30)),
            *("env", *(f"{name}={value}" for name, value in sorted(passed.items()))),
            *("bash", str(LAUNCH / "torchrun.sh"), *self._arguments),
        ]
        return f"cd {shlex.quote(str(Path.cwd()))} && exec {shlex.join(words)}"


def outcome(codes: Sequence[int], is_stopped: bool) -> int:
    """Return the exit code of a run whose hosts ended with ``codes``, in this order."""
    bad = [code for code in codes if code]
    if BAD_INPUT in bad:
        return BAD_INPUT
    if is_stopped and all(code in (STOPPED, 128 + signal.SIGTERM) for code in bad):
        return STOPPED
    if 0 in codes and all(code == SSH_FAILED for code in bad):
        return 0  # the run is done, even where the connection was lost
    return 1 if SSH_FAILED in bad[:1] or not codes else bad[0]


def last_line(text: str) -> str:
    """Return the last line of a text, without surrounding spaces; empty for an empty text."""
    return (text.strip().splitlines() or [""])[-1].strip()


def unfit(ssh: Sequence[str], host: str) -> str | None:
    """Return why nothing can be started on a host; None when it can."""
    folder, script = shlex.quote(str(Path.cwd())), shlex.quote(str(LAUNCH / "torchrun.sh"))
    command = f"cd {folder} && test -f {script}"
    done = subprocess.run(
        [*ssh, host, command], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
    )
    if done.returncode == 0:
        return None
    if done.returncode == SSH_FAILED:
        return f"{host}: {last_line(done.stderr) or 'no answer'}"
    return (
        f"{host}: {Path.cwd()} or {LAUNCH} is not there; all hosts need this folder, and the same"
    )


def tell(line: str) -> None:
    """Print a whole line at a time, from any thread."""
    with suppress(OSError):
        os.write(sys.stdout.fileno(), f"{line}\n".encode())


def main(arguments: Sequence[str]) -> int:
    """Run ``[--ssh-option=-p2222] HOSTFILE CONFIG key=value ...`` and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m hourglass_dist.launch.ssh")
    parser.add_argument("--ssh-option", action="append", default=[], help="such as -p2222")
    parser.add_argument("--pass", dest="passed", action="append", default=[], help="a variable")
    parser.add_argument("hostfile", type=Path, help="a line 'HOST slots=RANKS' for each node")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="CONFIG key=value ...")
    given = parser.parse_args(arguments)
    try:
        if not given.arguments:
            raise ValueError("expected HOSTFILE CONFIG [key=value ...]")
        names, slots = read_hostfile(given.hostfile)
        ssh = [SSH[0], *(word for option in given.ssh_option for word in option.split()), *SSH[1:]]
        launcher = Launcher([Host(n, ssh) for n in names], slots, given.arguments, given.passed)
        with ThreadPoolExecutor(32) as pool:
            problems = [problem for problem in pool.map(lambda n: unfit(ssh, n), names) if problem]
        if problems and len(names) - len(problems) < launcher.fewest:
            raise ValueError("\n".join(problems))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    for host in launcher.hosts:
        if any(problem.startswith(f"{host.name}: ") for problem in problems):
            host.lost_at = time.monotonic()
    for problem in problems:
        tell(f"{problem}; going on without")
    return launcher.run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
