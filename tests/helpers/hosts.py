"""Several hosts on this machine: network namespaces on a bridge of their own, without a way out.

Each has its own host name, address and list of hosts, and sees only its own processes; the files
are the same everywhere, as on a shared file system. Needs root and Linux; ``missing`` says what is
not there.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

# Run by bash on a host: $1 its name, $2 its /etc/hosts; then the command. No resolver, so that
# nothing waits for one.
ENTER = (
    'hostname "$1"; mount --bind "$2" /etc/hosts; mount --bind /dev/null /etc/resolv.conf; '
    'shift 2; exec "$@"'
)


def missing() -> str | None:
    """Why there can be no hosts here; None if there can."""
    if os.geteuid() != 0:
        return "needs root"
    for program in ("ip", "nsenter", "unshare"):
        if not shutil.which(program):
            return f"needs {program}"
    with tempfile.TemporaryDirectory() as folder:
        tried = subprocess.run(
            ["unshare", "--net", "--uts", "--mount", "mount", "-t", "tmpfs", "none", folder],
            capture_output=True,
        )
    return "needs namespaces" if tried.returncode else None


class Hosts:
    """A context with ``count`` hosts NAME0, NAME1, ... at SUBNET.1, SUBNET.2, ...; another process
    that wants hosts of this name waits until these are gone."""

    def __init__(self, count: int, name: str = "hg", subnet: str = "10.91.0") -> None:
        self.names = [f"{name}{index}" for index in range(count)]
        self._subnet, self._switch = subnet, f"{name}sw"
        self._started: list[subprocess.Popen[bytes]] = []

    def address(self, host: int) -> str:
        """The address of a host."""
        return f"{self._subnet}.{host + 1}"

    def __enter__(self) -> Hosts:
        self._lock = Path(tempfile.gettempdir(), f"{self._switch}.lock").open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._folder = Path(tempfile.mkdtemp(prefix="hosts-"))
        lines = [f"{self.address(i)} {name}" for i, name in enumerate(self.names)]
        self.hosts_file = self._folder / "hosts"
        self.hosts_file.write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        try:
            self._connect()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _connect(self) -> None:
        switch = self._switch
        ip("netns", "add", switch)
        ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        ip("-n", switch, "link", "set", "bridge", "up")
        for index, name in enumerate(self.names):
            ip("netns", "add", name)
            ip(
                *("link", "add", f"v{name}", "netns", switch, "type", "veth"),
                *("peer", "name", "eth0", "netns", name),
            )
            ip("-n", switch, "link", "set", f"v{name}", "master", "bridge", "up")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "address", "add", f"{self.address(index)}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")

    def command(
        self,
        host: int,
        command: Sequence[str],
        *,
        is_machine: bool = True,
        name: str | None = None,
        hosts_file: Path | None = None,
    ) -> list[str]:
        """``command`` as it runs on a host.

        ``is_machine``: it gets a process tree of its own, and a SIGKILL to it ends all of that, as
        pulling the plug would. Without it the process is like any other (for daemons, and programs
        that talk to them by process id). ``name`` and ``hosts_file`` replace the host's.
        """
        tree = ("--pid", "--fork", "--kill-child", "--mount-proc") if is_machine else ()
        return [
            *("nsenter", f"--net=/run/netns/{self.names[host]}"),
            *("unshare", "--uts", "--mount", *tree, "bash", "-c", ENTER, "bash"),
            *(name or self.names[host], str(hosts_file or self.hosts_file), *command),
        ]

    def start(
        self,
        host: int,
        command: Sequence[str],
        log: Path,
        environment: Mapping[str, str] | None = None,
        is_machine: bool = True,
    ) -> subprocess.Popen[bytes]:
        """Start ``command`` on a host, what it says at the end of ``log``; it is killed when the
        hosts go."""
        with log.open("ab") as file:
            process = subprocess.Popen(
                self.command(host, command, is_machine=is_machine),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
            )
        self._started.append(process)
        return process

    def run(
        self, host: int, command: Sequence[str], timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Run ``command`` on a host to its end, among the other processes."""
        return subprocess.run(
            self.command(host, command, is_machine=False),
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def cut(self, host: int) -> None:
        """Pull a host's network cable."""
        ip("-n", self._switch, "link", "set", f"v{self.names[host]}", "down")

    def mend(self, host: int) -> None:
        """Plug it in again."""
        ip("-n", self._switch, "link", "set", f"v{self.names[host]}", "up")

    def slow_down(self, rate: str) -> None:
        """Let no more than ``rate``, such as 8mbit, through each cable: steps then take a time that
        depends little on the processor."""
        for name in self.names:
            words = ("qdisc", "add", "dev", f"v{name}", "root", "tbf", "rate", rate)
            limit = ("burst", "32kb", "latency", "1s")
            subprocess.run(["tc", "-n", self._switch, *words, *limit], check=True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for process in self._started:
            process.kill()
            process.wait(timeout=30)
        for name in [*self.names, self._switch]:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        shutil.rmtree(self._folder)
        self._lock.close()


def ip(*words: str) -> None:
    """The command of iproute2."""
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
