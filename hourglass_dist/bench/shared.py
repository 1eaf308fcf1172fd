"""Parts that all benchmarks share: the reference, the machine, timing, memory, tables.

A busy machine slows any variant that runs at the moment. So all variants of a comparison run in
turn, round after round, a ratio is the median of the ratios within a round, and one more round
before the first is a warm-up that does not count.
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
"""Least width of tables, characters."""
REFERENCE = "hourglass-transformer-pytorch"


def reference() -> Any:
    """Import and return the reference. Raises ValueError when it is not installed."""
    try:
        importlib.import_module("hourglass_transformer_pytorch.autoregressive_wrapper")
        return importlib.import_module("hourglass_transformer_pytorch")
    except ImportError:
        raise ValueError(
            f"{REFERENCE} is not installed: pip install hourglass_dist[test]"
        ) from None


def prepare(device: str, threads: int | None) -> torch.device:
    """Set the number of threads and return the device; ``auto`` is a GPU where there is one.
    Raises ValueError for an unknown or missing device."""
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
    """Return the machine that measures, its load, and the versions."""
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
    """Return the seconds that ``work`` takes, including its work on the device."""
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    """Wait until the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleave(
    variants: Mapping[str, Callable[[], float]], repeats: int, title: str
) -> dict[str, list[float]]:
    """Run all variants in turn, and return the seconds of each variant in each round."""
    found: dict[str, list[float]] = {name: [] for name in variants}
    console = Console(stderr=True)
    for turn in track(range(repeats + 1), title, console=console, transient=True):
        for name, variant in variants.items():
            taken = variant()
            if turn > 0:
                found[name].append(taken)
    return found


def ratio(over: Sequence[float], under: Sequence[float]) -> float:
    """Return the median of the ratios within a round."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


# --- memory --------------------------------------------------------------------------------------


def apart(function: Callable[..., T], *arguments: Any, threads: int) -> T:
    """Run ``function(*arguments)`` in a process of its own and return the result. Raises its
    ValueError or OSError, and RuntimeError when it ends without a result (out of memory)."""
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
    """Return the peak bytes that ``work`` takes beyond those in use. On the CPU they are the
    kernel's count of this process's resident memory, which needs a fresh process."""
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
    """Print a table; ``columns`` maps the title of each column to its format."""
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
    """Return the machine and the versions in one line."""
    where = facts["gpu"] or f"{facts['processor']}, {facts['cores']} cores"
    return (
        f"{where}, {facts['threads']} threads, load {facts['load']}, torch {facts['torch']}, "
        f"{REFERENCE} {facts[REFERENCE]}"
    )


def write(path: Path | None, facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the machine and the rows as JSON; None as path writes nothing."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")
