"""ZeRO-3's optimizer state in files (NVMe offload): loaded into memory while it is used.

DeepSpeed steps one sub-group after another and keeps its fp32 weights and moments in files between
steps; the tensors are empty meanwhile. Sub-groups of less than 1 MiB stay in memory.

    with in_memory(optimizer, flat)        flat and its moments are in memory inside
    each_in_memory(optimizer, fragments)   fragments, each while its flat tensor is in memory
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from hourglass_dist.config.loader import ConfigError
from hourglass_dist.engine.sharded_state import Fragment


@contextmanager
def in_memory(optimizer: Any, flat: torch.Tensor, *, changed: bool = False) -> Iterator[None]:
    """Load DeepSpeed's state of a flat tensor into memory in this context, and write it to its
    files afterwards if ``changed``. Without offload to files, do nothing."""
    swapper = getattr(optimizer, "optimizer_swapper", None)
    if swapper is None or flat.ds_id not in swapper.swap_params_info:  # type: ignore[attr-defined]
        yield
        return
    is_new = not optimizer.state.get(flat)  # it has no files yet; the context may create it
    swapper.swap_in_optimizer_state(parameter=flat)
    try:
        yield
    finally:
        if changed or is_new:
            swapper.swap_out_optimizer_state(parameter=flat)
        else:
            swapper.release_swap_buffers(parameter=flat)
        flat.grad = None  # it pointed into the buffers


def each_in_memory(
    optimizer: Any, fragments: Iterable[Fragment], *, changed: bool = False
) -> Iterator[Fragment]:
    """Yield the same fragments, each while its flat tensor is in memory."""
    for _, group in groupby(fragments, key=lambda fragment: id(fragment.flat)):
        same = list(group)
        with in_memory(optimizer, same[0].flat, changed=changed):
            yield from same


def forget_moments(optimizer: Any) -> None:
    """Set the optimizer's state to zero, except the weights."""
    for flat, state in optimizer.state.items():
        with in_memory(optimizer, flat, changed=True):
            for tensor in state.values():
                tensor.zero_()


def require_files(builder: Any, folder: Path) -> None:
    """Create the folder, and compile DeepSpeed's async_io unless it is compiled already (minutes).

    ``builder`` is DeepSpeed's builder of async_io. Raises ConfigError when either fails.
    """
    section = "deepspeed.zero_optimization"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{section}.offload_folder: {folder}: {error.strerror}") from None
    if not builder.is_compatible():
        raise ConfigError(
            f"{section}.offload_optimizer: nvme: needs libaio and a C++ compiler on every machine "
            "(Debian, Ubuntu: apt-get install libaio-dev g++)"
        )
    try:
        builder.load(verbose=False)
    except (RuntimeError, ImportError, OSError) as error:
        raise ConfigError(
            f"{section}.offload_optimizer: nvme: DeepSpeed's async_io cannot be compiled: "
            f"{str(error).splitlines()[0]}"
        ) from None
