"""The clients of ``measure/store.py``: store_clients.py PORT CLIENTS REPEATS."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]

TIMEOUT = timedelta(seconds=120)
NOTE = json.dumps({"bytes": 76_420_000_000 // 4096, "crc32c": 2**32 - 1})
"""What a rank says about its file of a checkpoint."""


def _timed(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def main() -> None:
    """Figures as JSON on standard output."""
    port, clients, repeats = map(int, sys.argv[1:])
    with ThreadPoolExecutor(clients) as pool:
        found: dict[str, list[float]] = {"connect": []}

        def connect() -> TCPStore:
            begun = time.perf_counter()
            made = TCPStore("127.0.0.1", port, timeout=TIMEOUT)
            found["connect"].append(time.perf_counter() - begun)
            return made

        # one by one: some wait for a name server that does not know this machine, medians do not
        stores = [connect() for _ in range(clients)]
        for turn in range(repeats):
            for name, seconds in _turn(pool, stores, turn).items():
                found.setdefault(name, []).append(seconds)
    middle = {name: statistics.median(values) for name, values in found.items()}
    in_ms = {name: 1e3 * value for name, value in middle.items()}
    print(json.dumps({"clients": clients, "rate": 2 * clients / middle["taken"]} | in_ms))


def _turn(pool: ThreadPoolExecutor, stores: Sequence[TCPStore], turn: int) -> dict[str, float]:
    keys = [f"step_{turn:08d}/{rank}" for rank in range(len(stores))]
    main = stores[0]

    def meet(store: TCPStore) -> None:
        if store.add(f"count {turn}", 1) == len(stores):
            store.set(f"all {turn}", "1")
        store.wait([f"all {turn}"])

    def take() -> None:
        for key in keys:
            main.get(key)
            main.delete_key(key)

    return {
        "barrier": _timed(lambda: list(pool.map(meet, stores))),
        "posted": _timed(lambda: list(pool.map(lambda s, k: s.set(k, NOTE), stores, keys))),
        "looked": _timed(lambda: main.check(keys)),
        "taken": _timed(take),
    }


if __name__ == "__main__":
    main()
