"""What the one store of a run takes from many ranks: connections, barriers, notes of a checkpoint.

    python -m tests.measure.store --clients 16,64 --repeats 3

All ranks connect to one server (``TCPStore``, on the first node), meet there, and leave it the
notes of every checkpoint. Here the clients are threads of one other process, a connection each,
and do what ranks do: all of them at once.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import typer
from paths import HELPERS
from ranks import numbers
from torch._C._distributed_c10d import TCPStore

from hourglass_dist.bench.shared import show

TIMEOUT = timedelta(seconds=120)


def bench_store(clients: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """Measure, print and return the rows."""
    rows = [_measure(count, repeats) for count in clients]
    columns = {"clients": "{clients:,}", "one connection ms": "{connect:.2f}"}
    columns |= {"barrier ms": "{barrier:.1f}", "notes left ms": "{posted:.1f}"}
    columns |= {"one look at all ms": "{looked:.2f}", "all taken ms": "{taken:.1f}"}
    columns |= {"of one client, calls a second": "{rate:,.0f}"}
    show("One store on this machine, medians", rows, columns)
    return rows


def _measure(clients: int, repeats: int) -> dict[str, Any]:
    """The server is in this process, the clients are in another one."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
    arguments = [str(server.port), str(clients), str(repeats)]
    done = subprocess.run(
        [sys.executable, str(HELPERS / "store_clients.py"), *arguments],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main(clients: str = "16,64,256", repeats: int = 5) -> None:
    """Print the table."""
    bench_store(numbers(clients), repeats)


if __name__ == "__main__":
    typer.run(main)
