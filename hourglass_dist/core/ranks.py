"""Ranks: the process group, and the few collectives that the rest of the project uses.

Under torchrun the process group spans all ranks. Without it there is one rank, and no port is
opened.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import os
import re
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as td
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]

T = TypeVar("T")

TIMEOUT = timedelta(minutes=10)
"""Default timeout of a collective that waits for another rank."""
NOTE_TIMEOUT = timedelta(minutes=30)
"""Timeout of a note of another rank; longer than a rank's part of a checkpoint takes."""


@dataclass(frozen=True)
class World:
    """Rank and device of this process, and the number of ranks."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this rank prints, logs and writes the files that exist once (rank 0)."""
        return self.rank == 0


def init(timeout: timedelta = TIMEOUT, on_cpu: bool = False) -> World:
    """Join the process group and return this rank's World; later calls change nothing. The backend
    is nccl on a GPU, gloo otherwise or with ``on_cpu``. ``timeout`` limits how long a collective
    waits for a rank."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    on_gpu = torch.cuda.is_available() and not on_cpu
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        _end_with_parent()
    if not td.is_initialized():
        backend = "nccl" if on_gpu else "gloo"
        if "RANK" in os.environ:
            td.init_process_group(backend, timeout=timeout)
        else:
            os.environ.setdefault("LOCAL_RANK", "0")
            td.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
        atexit.register(shutdown)
    return World(td.get_rank(), td.get_world_size(), device)


def _end_with_parent() -> None:
    """Let Linux kill this process when torchrun dies. A rank that continued alone would hold the
    run folder and train beside the restarted ranks."""
    with suppress(OSError, AttributeError):  # not Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.environ.get("HOURGLASS_AGENT", str(os.getppid())) != str(os.getppid()):
        leave(1)  # torchrun died before prctl


_PR_SET_PDEATHSIG = 1


def shutdown() -> None:
    """Leave the process group, if there is one."""
    if td.is_initialized():
        td.destroy_process_group()
        # Threads of gloo free the last tensors late, and need Python for it: one that does so
        # after Python's end aborts the process ("terminate called without an active exception").
        time.sleep(0.3)


def leave(code: int) -> NoReturn:
    """End this process without cleaning up libraries: library threads that still ran at that moment
    were seen to turn a finished run into SIGABRT."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def lost_rank(error: RuntimeError) -> str | None:
    """Return the words of a collective's error that tell of a lost rank; None for other errors."""
    match = re.search(
        r"Connection (closed|reset) by peer( \[[^]]*\](:\d+)?)?|Timed out waiting \d+ms"
        r"|remote process exited|Broken pipe",
        str(error),
    )
    return match[0] if match else None


def is_main_process() -> bool:
    """Return whether this is rank 0; works before ``init``."""
    return int(os.environ.get("RANK", "0")) == 0


def barrier() -> None:
    """Wait until every rank has called this."""
    td.barrier()


def sum_over_ranks(values: Sequence[float], device: torch.device) -> list[float]:
    """Return the element-wise sum over all ranks, in float64."""
    total = torch.tensor(values, dtype=torch.float64, device=device)
    td.all_reduce(total)
    result: list[float] = total.tolist()
    return result


def gather_ints(values: Sequence[int], device: torch.device) -> list[list[int]]:
    """Return the equally long integer lists of all ranks, in rank order, on every rank."""
    mine = torch.tensor(values, dtype=torch.int64, device=device)
    return [other.tolist() for other in gather(mine)]


def gather(tensor: Tensor) -> list[Tensor]:
    """Return the tensors of all ranks, of one shape and type, in rank order, on every rank."""
    everyone = [torch.empty_like(tensor) for _ in range(td.get_world_size())]
    td.all_gather(everyone, tensor)
    return everyone


def gather_floats(values: Sequence[float], device: torch.device) -> list[list[float]]:
    """Return the equally long float64 lists of all ranks, in rank order, on every rank."""
    mine = torch.tensor(values, dtype=torch.float64, device=device)
    return [other.tolist() for other in gather(mine)]


def gather_texts(text: str, device: torch.device) -> list[str]:
    """Return the texts of all ranks, in rank order, on every rank."""
    data = text.encode()
    lengths = [length for (length,) in gather_ints([len(data)], device)]
    mine = torch.zeros(max(1, *lengths), dtype=torch.uint8)
    mine[: len(data)] = torch.tensor(list(data), dtype=torch.uint8)
    everyone = zip(gather(mine.to(device)), lengths, strict=True)
    return [bytes(other[:length].tolist()).decode(errors="replace") for other, length in everyone]


def require_same_on_all_ranks(values: Mapping[str, str], device: torch.device) -> None:
    """Raise ValueError on every rank unless ``values`` are the same on all. The message names the
    first value that differs and up to eight ranks that differ from rank 0."""
    hashes = [hash_int(f"{name}={value}") for name, value in values.items()]
    everyone = gather_ints(hashes, device)
    for index, name in enumerate(values):
        other = [r for r, theirs in enumerate(everyone) if theirs[index] != everyone[0][index]]
        if other:
            raise ValueError(
                f"ranks disagree: {name} is another one on rank {', '.join(map(str, other[:8]))} "
                "than on rank 0"
            )


def hash_int(text: str) -> int:
    """Return 63 bits of the sha256 of a text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def raise_on_all_ranks(action: Callable[[], T], device: torch.device) -> T:
    """Run ``action`` on every rank and return its result.

    When it raises ValueError or OSError on any rank, every rank raises ValueError with that
    message. Otherwise an error of one rank (a damaged shard, a full disk) would leave the others
    waiting in their next collective.
    """
    result: T | None = None
    exception: Exception | None = None
    try:
        result = action()
    except (ValueError, OSError) as error:
        exception = error
    size = td.get_world_size()
    first = torch.tensor(size - td.get_rank() if exception else 0, device=device)
    td.all_reduce(first, td.ReduceOp.MAX)  # the lowest rank that failed; one collective if none did
    if first:
        message = str(exception)[:4000] or type(exception).__name__
        raise ValueError(gather_texts(message, device)[size - int(first)]) from exception
    return result  # type: ignore[return-value]  # no rank raised, so action returned


def put_note(key: str, text: str) -> None:
    """Store a note for ``wait_for_notes``, from any thread and without a collective."""
    _store().set(key, text)


def wait_for_notes(keys: Iterable[str]) -> list[str]:
    """Wait for the notes under ``keys``, remove them from the store and return them.

    Raises ValueError when one is missing after ``NOTE_TIMEOUT``.
    """
    wanted, store = list(keys), _store()
    deadline = time.monotonic() + NOTE_TIMEOUT.total_seconds()
    while not store.check(wanted):
        if time.monotonic() > deadline:
            missing = [key for key in wanted if not store.check([key])]
            raise ValueError(f"no word within {NOTE_TIMEOUT} about {', '.join(missing[:8])}")
        time.sleep(0.02)
    notes = [store.get(key).decode() for key in wanted]
    for key in wanted:
        store.delete_key(key)
    return notes


def _store() -> Any:
    """Return the key-value store of the process group; it serves until the end."""
    return td.distributed_c10d._get_default_store()


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed the random generators (dropout) from (seed, step, rank) alone.

    A resumed run therefore needs no saved generator states.
    """
    number = zlib.crc32(f"{seed}/{step}/{rank}".encode())
    torch.default_generator.manual_seed(number)  # torch.manual_seed takes half a millisecond
    if torch.cuda.is_available():
        torch.cuda.manual_seed(number)
