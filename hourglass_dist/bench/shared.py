"""What every benchmark needs: the reference, the machine, fair timing, memory, tables.

A busy machine slows whatever runs at the moment. So all variants of a comparison run in turn,
round after round, a ratio is the median of the ratios within a round, and the round before the
first does not count.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from hourglass_dist.core.files import replace
from hourglass_dist.core.version import __version__

T = TypeVar("T")
MIB = 2**20
WIDTH = 132
"""Columns of text that a table may always take."""
REFERENCE = "hourglass-transformer-pytorch"


def reference() -> Any:
    """The module of the reference. Raises ValueError when it is not installed."""
    try:
        importlib.import_module("hourglass_transformer_pytorch.autoregressive_wrapper")
        return importlib.import_module("hourglass_transformer_pytorch")
    except ImportError:
        raise ValueError(
            f"{REFERENCE} is not installed: pip install hourglass_dist[test]"
        ) from None


def prepare(device: str, threads: int | None) -> torch.device:
    """Set the number of threads; the device, ``auto`` being a GPU where there is one. Raises
    ValueError for one that is not there."""
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device: expected auto, cpu or cuda, given {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: cuda: this PyTorch sees no GPU")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if threads is not None:
        torch.set_num_threads(threads)
    return torch.device(device)


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on, and with which versions."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "hourglass_dist": __version__,
        REFERENCE: _version(REFERENCE),
    }


def _processor() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


# --- time ----------------------------------------------------------------------------------------


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long ``work`` takes, the device's part of it included."""
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleave(
    variants: Mapping[str, Callable[[], float]], repeats: int, title: str
) -> dict[str, list[float]]:
    """The seconds that each variant returns in each round."""
    found: dict[str, list[float]] = {name: [] for name in variants}
    console = Console(stderr=True)
    for turn in track(range(repeats + 1), title, console=console, transient=True):
        for name, variant in variants.items():
            taken = variant()
            if turn > 0:
                found[name].append(taken)
    return found


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """The median of the ratios within a round."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


# --- memory --------------------------------------------------------------------------------------


def apart(function: Callable[..., T], *arguments: Any, threads: int) -> T:
    """``function(*arguments)`` in a process of its own. Raises the ValueError or OSError that it
    raises there, and RuntimeError when it ends without a result, as for lack of memory."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(
        target=_answer, args=(theirs, threads, function, arguments), daemon=True
    )
    process.start()
    theirs.close()
    try:
        result: T | Exception = ours.recv()
    except EOFError:
        process.join()
        raise RuntimeError(
            f"{function.__name__}: its process ended with {process.exitcode}"
        ) from None
    process.join()
    if isinstance(result, Exception):
        raise result
    return result


def _answer(
    answers: Connection, threads: int, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(threads)
    try:
        answers.send(function(*arguments))
    except (ValueError, OSError) as error:
        answers.send(error)
    except KeyboardInterrupt:
        os._exit(130)


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The most memory that ``work`` takes at a time, on top of what is in use. On the CPU it is the
    resident memory of this process as the kernel counts it: call it in a fresh one."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM becomes VmRSS
    before = _resident("VmRSS")
    work()
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/self/status has no {name}")


# --- telling -------------------------------------------------------------------------------------


def show(title: str, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> None:
    """A table on standard output; ``columns`` is what stands above each and its format."""
    table = Table()
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(pattern.format_map(row) for pattern in columns.values()))
    console = Console(highlight=False)
    console.width = max(console.width, WIDTH)
    console.print(f"\n{title}", style="bold")
    console.print(table)


def headline(facts: Mapping[str, Any]) -> str:
    """The machine in one line."""
    where = facts["gpu"] or f"{facts['processor']}, {facts['cores']} cores"
    return (
        f"{where}, {facts['threads']} threads, load {facts['load']}, torch {facts['torch']}, "
        f"{REFERENCE} {facts[REFERENCE]}"
    )


def write(path: Path | None, facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Machine and rows as JSON."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")
