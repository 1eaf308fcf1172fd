"""Where and how the nodes of a run find each other, and words for when they do not.

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
"""Seconds without an answer after which a connection to the store is given up. Longer than a switch
takes to restart a link."""
NOTICE = 10.0
"""Seconds of waiting after which a line says for what."""
ENDED, GONE = "hourglass/ended", "hourglass/gone"
"""Keys in the store: the exit code of a node whose ranks have ended for good; how many have."""
LINGER = 40.0
"""Seconds for which the store is served after a bad end, so that other nodes learn of it."""


def say(line: str) -> None:
    """A line for the person who looks after the run."""
    print(line, file=sys.stderr, flush=True)


class Meeting:
    """The place, who is expected there, and who has come."""

    def __init__(
        self, endpoint: str, nodes: tuple[int, int], seconds: float, names: Sequence[str] = ()
    ) -> None:
        """``endpoint``: HOST:PORT; ``nodes``: the fewest and the most; ``names``: theirs, where
        they are known beforehand."""
        self.host, _, port = endpoint.rpartition(":")
        self.port = int(port)
        self.fewest, self.most, self.seconds = *nodes, seconds
        self._expected, self._here = list(names), set[str]()
        self._until = self._since = time.monotonic() + seconds
        self._is_waiting = self._noticed = self.has_met = self.serves = False
        self._sign: socket.socket | None = None

    @property
    def place(self) -> str:
        """As one writes it."""
        return f"{self.host}:{self.port}"

    def left(self) -> float:
        """Seconds until nodes that are apart give up."""
        return self._until - time.monotonic()

    def begin(self, is_first: bool) -> None:
        """Nodes are apart, or were never together; ``is_first``: for the first time."""
        if is_first or self.has_met:
            self._until = time.monotonic() + self.seconds
        self._here, self.has_met = set(), False

    # --- before torchrun ------------------------------------------------------------------------

    def find(self, job: str) -> None:
        """Wait until the place can be reached, or this node is to serve the store there.

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
        """Whether the port is free; False when another node of this job on this machine serves."""
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
                except OSError:  # held by the one who serves
                    return False
            time.sleep(0.5)
        raise ValueError(
            f"MASTER_PORT: {self.port} is taken on {socket.gethostname()}, by another run perhaps; "
            "choose a free one (MASTER_PORT=..., or port: in the cluster file)"
        )

    # --- while torchrun waits -------------------------------------------------------------------

    def watch(self, handler: Any) -> None:
        """Look at who is there whenever torch's c10d rendezvous does."""
        holder, this = handler._state_holder, handler._this_node
        sync = holder.sync

        def look() -> Any:
            result = sync()
            there = {*holder.state.participants, *holder.state.wait_list}
            if this in there:  # who gives up has left before it says so
                self._here = {node.addr for node in there}
            late = time.monotonic() - self._since > NOTICE
            if self._is_waiting and late and not self._noticed:
                say(f"waiting for nodes at {self.place}: {self.roll()}; {self.left():.0f} s left")
                self._noticed = True
            return result

        holder.sync = look
        impatient(self.port)

    def gather(self, handler: Any) -> None:
        """Nodes are about to meet, for the first time or after they were together."""
        if self.has_met:
            self._until = time.monotonic() + self.seconds
            handler.settings.timeout._join = timedelta(seconds=self.seconds)
        self._since, self._is_waiting, self._noticed = time.monotonic(), True, False

    def roll(self) -> str:
        """How many are there of how many, and who."""
        fewest = f"{self.fewest} to " if self.fewest < self.most else ""
        known = {short(name) for name in self._here}
        missing = [name for name in self._expected if short(name) not in known]
        return (
            f"{len(self._here)} of {fewest}{self.most} nodes are there"
            + f" ({', '.join(sorted(self._here))})" * bool(self._here)
            + f", missing: {', '.join(missing)}" * bool(missing)
        )

    def complete(self, names: Mapping[str, int], is_main: bool) -> None:
        """All that are needed have met: ``names`` of nodes, and their ranks."""
        self.has_met, self._is_waiting = True, False
        if is_main and len(names) < self.most:
            say(f"{len(names)} of {self.most} nodes: {', '.join(sorted(names))}")

    # --- afterwards -----------------------------------------------------------------------------

    def part(self, store: Any, code: int, nodes: int) -> None:
        """Leave with an exit code; the node that serves the store waits for the others."""
        until = time.monotonic() + LINGER
        with suppress(RuntimeError):
            store.set(ENDED, str(code))
            while store.add(GONE, 1) < nodes and self.serves and time.monotonic() < until:
                store.add(GONE, -1)
                time.sleep(0.2)

    def ended(self) -> int:
        """The exit code of the node that has ended the run; 1 when it is not to be had."""
        with suppress(RuntimeError, ValueError):
            store = TCPStore(
                *(self.host, self.port, None, False, timedelta(seconds=5)), wait_for_workers=False
            )
            if store.check([ENDED]):
                return int(store.get(ENDED))
        return 1


def short(name: str) -> str:
    """A host's name without its domain; addresses as they are."""
    return name if re.fullmatch(r"[\d.]+|.*:.*", name) else name.partition(".")[0]


def addresses_of(host: str) -> list[str]:
    """All addresses of a host. Raises socket.gaierror when its name is not known."""
    return [str(found[4][0]) for found in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]


def is_own(address: str) -> bool:
    """Whether an address is one of this machine: nothing can be bound to those of others."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as tried, suppress(OSError):
        tried.bind((address, 0))
        return True
    return False


def interfaces() -> dict[str, str]:
    """The network interfaces of this machine that have an IPv4 address, and that."""
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
    """The address under which other nodes reach this one, where its name does not lead to it (that
    of Debian's is 127.0.1.1); None: the name does.

    Raises ValueError when the interface is not there, or several might be meant.
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
    """Let Linux end this process's connections to a port that get no answer within ``PATIENCE``:
    torch would wait at a cut cable for a quarter of an hour, or for ever."""
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
