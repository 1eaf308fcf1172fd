"""ZeRO-3's optimizer state in files, as on an NVMe disk: in memory while it is looked at.

DeepSpeed steps one sub-group after another and keeps each one's fp32 weights and moments in files
between its steps; the tensors are empty then. Sub-groups of less than 1 MiB stay in memory.

    with here(optimizer, flat):    flat and its moments are whole inside
    each_here(optimizer, parts)    parts of flat tensors, each one while its flat tensor is whole
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
def here(optimizer: Any, flat: torch.Tensor, *, changed: bool = False) -> Iterator[None]:
    """What DeepSpeed's ``optimizer`` keeps of a flat tensor is in memory inside; ``changed``: it is
    written afterwards. Nothing happens where no files are used."""
    swapper = getattr(optimizer, "optimizer_swapper", None)
    if swapper is None or flat.ds_id not in swapper.swap_params_info:  # type: ignore[attr-defined]
        yield
        return
    new = not optimizer.state.get(flat)  # has no files yet, and may be made inside
    swapper.swap_in_optimizer_state(parameter=flat)
    try:
        yield
    finally:
        leave = swapper.swap_out_optimizer_state if changed or new else swapper.release_swap_buffers
        leave(parameter=flat)
        flat.grad = None  # was in the buffers, too


def each_here(
    optimizer: Any, parts: Iterable[Fragment], *, changed: bool = False
) -> Iterator[Fragment]:
    """The same parts, one flat tensor after another."""
    for _, group in groupby(parts, key=lambda part: id(part.flat)):
        same = list(group)
        with here(optimizer, same[0].flat, changed=changed):
            yield from same


def forget_moments(optimizer: Any) -> None:
    """Make all that is kept besides the weights zero."""
    for flat, state in optimizer.state.items():
        with here(optimizer, flat, changed=True):
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
