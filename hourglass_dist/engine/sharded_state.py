"""Training state on disk: flat ranges of named tensors, in one safetensors file for each rank.

At every ZeRO stage a rank holds one range of a tensor's flattened elements. It writes that range
under the key ``kind/name@start``:

    rank_00000.safetensors   fp32/blocks.0.weight@0      exp_avg/blocks.0.weight@0     ...
    rank_00001.safetensors   fp32/blocks.0.weight@4096   exp_avg/blocks.0.weight@4096  ...

``Reader`` reads any range of any tensor from the files that hold it, so a state written at one
number of ranks and ZeRO stage is read at any other. Nothing is unpickled. Kinds: ``fp32`` (master
weights), ``exp_avg``, ``exp_avg_sq`` (AdamW), ``momentum_buffer`` (Muon), ``frozen`` (weights
without gradient).
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hourglass_dist.core.files import sync


class Key(NamedTuple):
    """Key of a range of a flattened tensor, which begins at element ``start``."""

    kind: str
    name: str
    start: int

    def __str__(self) -> str:
        return f"{self.kind}/{self.name}@{self.start}"

    @classmethod
    def parse(cls, text: str) -> Key:
        """Return the key that ``str`` writes as ``text``."""
        kind, _, rest = text.partition("/")
        name, _, start = rest.rpartition("@")
        return cls(kind, name, int(start))


class Fragment(NamedTuple):
    """A range of a parameter that this rank holds."""

    name: str
    """Name of the parameter."""
    start: int
    """First element of the flattened parameter."""
    numel: int
    """Number of elements; 0 where this rank holds none."""
    flat: Tensor
    """Tensor that holds it: the fp32 tensor that the optimizer steps, or a frozen weight."""
    offset: int
    """First element in ``flat``."""
    is_saved_here: bool
    """Whether this rank saves it; other ranks may hold the same range."""

    @property
    def range(self) -> tuple[str, int, int]:
        """Name, start and number of elements."""
        return self.name, self.start, self.numel

    def view(self, tensor: Tensor) -> Tensor:
        """Return these elements of ``tensor``, which has the layout of ``flat``."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.numel)


def file_name(rank: int) -> str:
    """Return the name of a rank's state file."""
    return f"rank_{rank:05d}.safetensors"


class Snapshot(NamedTuple):
    """Copy of one rank's state at one step, on the CPU: another thread may write it while training
    continues."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]

    def write(self, path: Path) -> None:
        """Write the state to ``path``. Raises OSError when it cannot be written."""
        write_tensors(path, self.tensors, self.metadata)


class PinnedBuffers:
    """CPU memory for snapshots, allocated once: each snapshot overwrites the previous one."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def snapshot(
        self,
        ranges: Iterable[tuple[Key, Tensor]],
        shapes: Mapping[str, tuple[int, ...]],
        optimizer_steps: int,
        loss_scale: Mapping[str, float],
    ) -> Snapshot:
        """Return a copy of one rank's flat ranges (any device), copied one by one as ``ranges``
        yields them, with the full shapes of all tensors of the model."""
        copies = {}
        for key, values in ranges:
            copies[str(key)] = self._buffer(str(key), values)
            copies[str(key)].copy_(values.detach(), non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        metadata = {
            "shapes": json.dumps({name: list(shape) for name, shape in shapes.items()}),
            "optimizer_steps": str(optimizer_steps),
            "loss_scale": json.dumps(dict(loss_scale)),
        }
        return Snapshot(copies, metadata)

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != like.shape or buffer.dtype != like.dtype:
            buffer = torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)
            self._buffers[name] = buffer
        return buffer


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write and sync a safetensors file with umask permissions. Raises OSError on a full disk."""
    try:
        save_file(dict(tensors), path, metadata=metadata)
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written: {error}") from None
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)  # the library makes files that only their owner can read
    sync(path)


class Reader:
    """Reader of ranges of the tensors in a folder of rank files.

    Raises ValueError when the folder holds no readable state or a range of a tensor is in none of
    its files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ranges: dict[tuple[str, str], list[tuple[int, int, Path, str]]] = defaultdict(list)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.optimizer_steps = 0
        self.loss_scale: dict[str, float] = {}
        paths = sorted(folder.glob("rank_*.safetensors"))
        if not paths:
            raise ValueError(f"{folder}: expected rank_*.safetensors files, found none")
        for path in paths:
            self._index(path)

    def _index(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                self.shapes = {k: tuple(v) for k, v in json.loads(metadata["shapes"]).items()}
                self.optimizer_steps = int(metadata["optimizer_steps"])
                self.loss_scale = json.loads(metadata.get("loss_scale", "{}"))
                for text in file.keys():  # noqa: SIM118  (a safetensors file, not a dict)
                    key = Key.parse(text)
                    numel = file.get_slice(text).get_shape()[0]
                    self._ranges[key.kind, key.name].append((key.start, numel, path, text))
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{path}: not a readable state file: {error}") from None

    def names(self, kind: str) -> list[str]:
        """Return the names of the tensors of one kind, sorted."""
        return sorted(name for other, name in self._ranges if other == kind)

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Return elements [start, start + numel) of the flattened tensor, on the CPU in the stored
        dtype."""
        parts, position, end = [], start, start + numel
        for range_start, range_numel, path, text in sorted(self._ranges[kind, name]):
            range_end = range_start + range_numel
            if range_start <= position < range_end and position < end:
                stop = min(end, range_end)
                with safe_open(path, framework="pt") as file:
                    parts.append(file.get_slice(text)[position - range_start : stop - range_start])
                position = stop
        if position < end:
            raise ValueError(
                f"{self.folder}: {kind}/{name}: elements {position} to {end} are in no file"
            )
        return torch.cat(parts) if parts else torch.empty(0)

    def full(self, kind: str, name: str) -> Tensor:
        """Return a whole tensor, in its shape."""
        shape = self.shapes[name]
        numel = 1
        for size in shape:
            numel *= size
        return self.read(kind, name, 0, numel).reshape(shape)
