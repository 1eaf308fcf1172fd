"""The rendezvous of a run's nodes, and its messages when nodes do not meet.

Every node runs torchrun; they meet at MASTER_ADDR:MASTER_PORT, in a store that the torchrun of that
node serves.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
import struct
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]

PATIENCE = 60.0
"""Seconds without an answer after which a connection to the store is given up: longer than a switch
takes to restart a link."""
NOTICE = 10.0
"""Seconds of waiting after which one line says what is waited for."""
ENDED, GONE = "hourglass/ended", "hourglass/gone"
"""Keys in the store: exit code of a node whose ranks ended for good; number of such nodes."""
LINGER = 40.0
"""Seconds for which the store is served after a failure, so that other nodes learn of it."""


def say(line: str) -> None:
    """Print a line to standard error."""
    print(line, file=sys.stderr, flush=True)


class Meeting:
    """The rendezvous endpoint, the nodes expected there and those that have joined."""

    def __init__(
        self, endpoint: str, nodes: tuple[int, int], seconds: float, names: Sequence[str] = ()
    ) -> None:
        """Take ``endpoint`` (HOST:PORT), the fewest and most ``nodes``, the ``seconds`` that they
        wait for each other, and their ``names`` where known."""
        self.host, _, port = endpoint.rpartition(":")
        self.port = int(port)
        self.fewest, self.most, self.seconds = *nodes, seconds
        self._expected, self._here = list(names), set[str]()
        self._until = self._since = time.monotonic() + seconds
        self._is_waiting = self._noticed = self.has_met = self.serves = False
        self._sign: socket.socket | None = None

    @property
    def place(self) -> str:
        """The endpoint as HOST:PORT."""
        return f"{self.host}:{self.port}"

    def left(self) -> float:
        """Return the seconds until nodes that have not met give up."""
        return self._until - time.monotonic()

    def begin(self, is_first: bool) -> None:
        """Start an attempt to meet; the first, or one after a meeting, restarts the time limit."""
        if is_first or self.has_met:
            self._until = time.monotonic() + self.seconds
        self._here, self.has_met = set(), False

    # --- before torchrun ------------------------------------------------------------------------

    def find(self, job: str) -> None:
        """Wait until the endpoint can be reached, or turns out to be on this machine.

        Raises ValueError when its port is taken, TimeoutError when nothing answers in time.
        """
        begun, told = time.monotonic(), False
        while True:
            problem = f"MASTER_ADDR: {self.host} is not the name of a host that is known here"
            with suppress(socket.gaierror):
                if any(map(is_own, addresses_of(self.host))):
                    self.serves = self._free_port(job)
                    return
                problem = self._try()
            if not problem:
                return
            if self.left() <= 0:
                raise TimeoutError(f"{problem}; given up after {self.seconds:g} s")
            if not told and time.monotonic() - begun > NOTICE:
                say(f"{problem}: trying for {self.left():.0f} s more")
                told = True
            time.sleep(1)

    def _try(self) -> str:
        try:
            socket.create_connection((self.host, self.port), timeout=5).close()
        except OSError as error:
            reason = error.strerror or str(error)
            return f"{socket.gethostname()}: no answer from {self.place} ({reason.lower()})"
        return ""

    def _free_port(self, job: str) -> bool:
        """Return False when a node of this job here serves the port. Raises ValueError if taken."""
        for _ in range(20):  # an earlier run may be about to end
            with socket.socket() as tried, suppress(OSError):
                tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                tried.bind(("", self.port))
                if self._sign is None:
                    self._sign = socket.socket(socket.AF_UNIX)
                    self._sign.bind(f"\0hourglass/{self.port}/{job}")
                return True
            with socket.socket(socket.AF_UNIX) as sign:
                try:
                    sign.bind(f"\0hourglass/{self.port}/{job}")
                except OSError:  # held by the node that serves the store
                    return False
            time.sleep(0.5)
        raise ValueError(
            f"MASTER_PORT: {self.port} is taken on {socket.gethostname()}, by another run perhaps; "
            "choose a free one (MASTER_PORT=..., or port: in the cluster file)"
        )

    # --- while torchrun waits -------------------------------------------------------------------

    def watch(self, handler: Any) -> None:
        """Update the list of joined nodes whenever torch's c10d rendezvous syncs its state."""
        holder, this = handler._state_holder, handler._this_node
        sync = holder.sync

        def look() -> Any:
            result = sync()
            there = {*holder.state.participants, *holder.state.wait_list}
            if this in there:  # a node that gives up leaves before its message is printed
                self._here = {node.addr for node in there}
            late = time.monotonic() - self._since > NOTICE
            if self._is_waiting and late and not self._noticed:
                say(f"waiting for nodes at {self.place}: {self.roll()}; {self.left():.0f} s left")
                self._noticed = True
            return result

        holder.sync = look
        impatient(self.port)

    def gather(self, handler: Any) -> None:
        """Start to wait for the nodes; after an earlier meeting the time limit starts again."""
        if self.has_met:
            self._until = time.monotonic() + self.seconds
            handler.settings.timeout._join = timedelta(seconds=self.seconds)
        self._since, self._is_waiting, self._noticed = time.monotonic(), True, False

    def roll(self) -> str:
        """Return how many nodes have joined of how many, with the names of joined and missing."""
        fewest = f"{self.fewest} to " if self.fewest < self.most else ""
        known = {short(name) for name in self._here}
        missing = [name for name in self._expected if short(name) not in known]
        return (
            f"{len(self._here)} of {fewest}{self.most} nodes are there"
            + f" ({', '.join(sorted(self._here))})" * bool(self._here)
            + f", missing: {', '.join(missing)}" * bool(missing)
        )

    def complete(self, names: Mapping[str, int], is_main: bool) -> None:
        """Record that enough nodes have met; ``names`` maps their addresses to ranks."""
        self.has_met, self._is_waiting = True, False
        if is_main and len(names) < self.most:
            say(f"{len(names)} of {self.most} nodes: {', '.join(sorted(names))}")

    # --- afterwards -----------------------------------------------------------------------------

    def part(self, store: Any, code: int, nodes: int) -> None:
        """Store the exit code and leave; the node that serves the store waits for the others."""
        until = time.monotonic() + LINGER
        with suppress(RuntimeError):
            store.set(ENDED, str(code))
            while store.add(GONE, 1) < nodes and self.serves and time.monotonic() < until:
                store.add(GONE, -1)
                time.sleep(0.2)

    def ended(self) -> int:
        """Return the exit code of the node that has ended the run; 1 when it cannot be read."""
        with suppress(RuntimeError, ValueError):
            store = TCPStore(
                *(self.host, self.port, None, False, timedelta(seconds=5)), wait_for_workers=False
            )
            if store.check([ENDED]):
                return int(store.get(ENDED))
        return 1


def short(name: str) -> str:
    """Return a host's name without its domain, or an address unchanged."""
    return name if re.fullmatch(r"[\d.]+|.*:.*", name) else name.partition(".")[0]


def addresses_of(host: str) -> list[str]:
    """Return all addresses of a host. Raises socket.gaierror when its name is not known."""
    return [str(found[4][0]) for found in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]


def is_own(address: str) -> bool:
    """Return whether an address is one of this machine: only its own addresses can be bound."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as tried, suppress(OSError):
        tried.bind((address, 0))
        return True
    return False


def interfaces() -> dict[str, str]:
    """Return the IPv4 address of each network interface of this machine that has one."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            with suppress(OSError):
                reply = fcntl.ioctl(any_socket.fileno(), _SIOCGIFADDR, request)
                found[name] = socket.inet_ntoa(reply[20:24])
    return found


_SIOCGIFADDR = 0x8915


def own_address(interface: str | None) -> str | None:
    """Return the address at which other nodes reach this one; None when its host name resolves to
    one (on Debian it resolves to 127.0.1.1).

    Raises ValueError when the interface does not exist, or none is named and there are several.
    """
    there = interfaces()
    outside = {name: address for name, address in there.items() if not address.startswith("127.")}
    host, choice = socket.gethostname(), ", ".join(f"{n} ({a})" for n, a in outside.items())
    for name in interface.split(",") if interface else ():
        if name not in there:
            raise ValueError(f"NETWORK_INTERFACE: {host} has no {name}; it has {choice or 'none'}")
    with suppress(socket.gaierror):
        if not all(a.startswith("127.") or a == "::1" for a in addresses_of(socket.getfqdn())):
            return None
    if interface:
        return there[interface.split(",")[0]]
    if len(outside) != 1:
        raise ValueError(
            f"NETWORK_INTERFACE: the name {host} leads nowhere from other nodes; expected the "
            f"interface that they reach, one of {choice or 'none'}"
        )
    ((name, address),) = outside.items()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    return address


def impatient(port: int) -> None:
    """Make Linux close this process's connections to a port after ``PATIENCE`` seconds without an
    answer: after a cut cable torch would wait for a quarter of an hour, or for ever."""
    milliseconds = round(1000 * PATIENCE)
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            if not os.readlink(entry).startswith("socket:"):
                continue
            connection = socket.socket(fileno=os.dup(int(entry.name)))
        with suppress(OSError), connection:
            peer = connection.getpeername()
            if isinstance(peer, tuple) and peer[1] == port:
                for level, option, value in (
                    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds),
                    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
                    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10),
                    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),
                ):
                    connection.setsockopt(level, option, value)
