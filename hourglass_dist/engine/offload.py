"""ZeRO-3's optimizer state in files, as on an NVMe disk: in memory while it is looked at.

DeepSpeed steps one sub-group after another and keeps each one's fp32 weights and moments in files
between its steps; the tensors are empty then. Sub-groups of less than 1 MiB stay in memory.

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
    """Keep DeepSpeed's state of a flat tensor in memory inside, and write it to its files
    afterwards if ``changed``. Nothing happens where no files are used."""
    swapper = getattr(optimizer, "optimizer_swapper", None)
    if swapper is None or flat.ds_id not in swapper.swap_params_info:  # type: ignore[attr-defined]
        yield
        return
    is_new = not optimizer.state.get(flat)  # it has no files yet, and may be made inside
    swapper.swap_in_optimizer_state(parameter=flat)
    try:
        yield
    finally:
        if changed or is_new:
            swapper.swap_out_optimizer_state(parameter=flat)
        else:
            swapper.release_swap_buffers(parameter=flat)
        flat.grad = None  # it was in the buffers, too


def each_in_memory(
    optimizer: Any, fragments: Iterable[Fragment], *, changed: bool = False
) -> Iterator[Fragment]:
    """The same fragments, one flat tensor after another."""
    for _, group in groupby(fragments, key=lambda fragment: id(fragment.flat)):
        same = list(group)
        with in_memory(optimizer, same[0].flat, changed=changed):
            yield from same


def forget_moments(optimizer: Any) -> None:
    """Set the optimizer's state to zero, all but the weights."""
    for flat, state in optimizer.state.items():
        with in_memory(optimizer, flat, changed=True):
            for tensor in state.values():
                tensor.zero_()


def require_files(builder: Any, folder: Path) -> None:
    """Make the folder, and compile what reads and writes files, if that was not done before:
    minutes.

    ``builder`` is DeepSpeed's of async_io. Raises ConfigError when one of them cannot be had.
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
