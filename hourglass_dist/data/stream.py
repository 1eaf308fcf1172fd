"""Batches of rows in the order of ``order.py``, and the rows of an evaluation.

    manifest + (split, seq_len, batch_size, seed)  ->  Plan
    n  ->  ranks_cut  ->  locate_many  ->  ShardReader.row  ->  Batch, read ahead by one thread

The whole state of a stream is the number of rows consumed by completed steps and the plan: nothing
is remembered elsewhere, so a run goes on exactly where it was, on any number of ranks.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hourglass_dist.data.order import Int64s, Plan, locate_many, ranks_cut
from hourglass_dist.data.shards import IGNORED, Manifest, ShardReader, Split

READ_AHEAD = 4
"""Batches that wait, read, at most."""


@dataclass(frozen=True)
class Batch:
    """Rows of one rank. B: rows, L: tokens in a row."""

    tokens_BL: Tensor
    """int64: the token before each target."""
    targets_BL: Tensor
    """int64: what to predict; -100 where there is nothing."""
    row_ids: Int64s
    """The numbers of all B rows; -1 for rows that only fill a rank up."""
    documents_BL: Tensor | None = None
    """int64: which document of its row each target belongs to: 0, 1, 2, ... along the row. None
    where documents are not kept apart."""

    @property
    def rows(self) -> dict[str, Tensor | None]:
        """What a model reads, under the names of its arguments."""
        return {
            "tokens_BL": self.tokens_BL,
            "targets_BL": self.targets_BL,
            "documents_BL": self.documents_BL,
        }


class Stream:
    """The training rows of one rank."""

    def __init__(
        self,
        manifest: Manifest,
        split: Split,
        seq_len: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        isolate_documents: bool = False,
    ) -> None:
        """Plan the order and verify this rank's share of the shards (size and sha256).

        ``batch_size`` counts rows over all ranks; with ``isolate_documents`` batches say which
        document each target belongs to. Raises ValueError when a shard is not as the
        manifest says, ``seq_len`` does not divide a block or ``world_size`` not the batch.
        """
        ranks_cut(0, batch_size, world_size, rank)
        self.plan = Plan(
            dataset_id=manifest.dataset_id,
            rows_per_shard=manifest.rows(split, seq_len),
            seq_len=seq_len,
            lanes=batch_size,
            seed=seed,
        )
        manifest.verify(split, part=(rank, world_size))
        self._manifest, self._split = manifest, split
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size
        self._isolate_documents = isolate_documents

    def batches(self, start_row: int = 0) -> Generator[Batch, None, None]:
        """This rank's batches for ever, the first global one beginning at row ``start_row``.

        A thread reads ahead; it ends when the generator is closed or collected.
        """
        if start_row < 0:
            raise ValueError(f"start row: expected at least 0, given {start_row}")
        return _read_ahead(self._read(start_row))

    def _read(self, start_row: int) -> Generator[Batch, None, None]:
        with closing(ShardReader(self._manifest, self._split, self.plan.seq_len)) as reader:
            while True:
                cut = ranks_cut(start_row, self._batch_size, self._world_size, self._rank)
                ns = np.arange(cut.start, cut.stop, dtype=np.int64)
                found = locate_many(self.plan, ns)
                yield _batch(reader, found.shards, found.rows, ns, self._isolate_documents)
                start_row += self._batch_size

    def state(self, next_row: int) -> dict[str, Any]:
        """The state after ``next_row`` rows of completed steps; survives JSON."""
        return self._settings() | {"next_row": next_row}

    def check(self, state: dict[str, Any]) -> None:
        """Raise ValueError, naming the field, when a state is of another stream than this one."""
        for name, ours in self._settings().items():
            if state.get(name) != ours:
                raise ValueError(
                    f"data: {name} differs: the checkpoint has {state.get(name)!r}, "
                    f"this run has {ours!r}"
                )

    def _settings(self) -> dict[str, Any]:
        plan = self.plan
        return {
            "dataset_id": plan.dataset_id,
            "split": self._split,
            "seq_len": plan.seq_len,
            "lanes": plan.lanes,
            "seed": plan.seed,
            "plan": plan.hash,
        }


def held_out_rows(
    manifest: Manifest,
    split: Split,
    seq_len: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    isolate_documents: bool = False,
) -> Iterator[Batch]:
    """The rows of a split once, in order: contiguous cuts to the ranks, in batches.

    All ranks get the same number of batches of the same shapes: a rank with a row fewer gets one of
    -100 only. The last batch is smaller when the rows do not divide by ``batch_size``. This rank's
    share of the shards is verified at the call. Raises ValueError as ``Stream`` does.
    """
    rows_per_shard = manifest.rows(split, seq_len)
    manifest.verify(split, part=(rank, world_size))
    total = sum(rows_per_shard)
    begin, end = total * rank // world_size, total * (rank + 1) // world_size
    ids = np.full(-(-total // world_size), -1, dtype=np.int64)
    ids[: end - begin] = np.arange(begin, end)
    reader = ShardReader(manifest, split, seq_len)
    return _held_out_batches(reader, ids, batch_size, isolate_documents)


def _held_out_batches(
    reader: ShardReader, ids: Int64s, batch_size: int, isolate_documents: bool
) -> Iterator[Batch]:
    ends = np.cumsum(reader.rows_per_shard)
    begins = ends - np.asarray(reader.rows_per_shard)
    with closing(reader):
        for first in range(0, len(ids), batch_size):
            some = ids[first : first + batch_size]
            known = np.maximum(some, 0)
            shards: Int64s = np.searchsorted(ends, known, side="right")
            batch = _batch(reader, shards, known - begins[shards], some, isolate_documents)
            batch.targets_BL[torch.from_numpy(some < 0)] = IGNORED
            yield batch


def _batch(
    reader: ShardReader, shards: Int64s, rows: Int64s, ids: Int64s, isolate_documents: bool
) -> Batch:
    pairs = [reader.row(int(shard), int(row)) for shard, row in zip(shards, rows, strict=True)]
    tokens_BL = torch.from_numpy(np.stack([inputs_L for inputs_L, _ in pairs]))
    targets_BL = torch.from_numpy(np.stack([targets_L for _, targets_L in pairs]))
    documents_BL = number_documents(tokens_BL, targets_BL, reader.eos_id)
    return Batch(tokens_BL, targets_BL, ids, documents_BL if isolate_documents else None)


def number_documents(tokens_BL: Tensor, targets_BL: Tensor, eos_id: int) -> Tensor:
    """Which document of its row each target belongs to (0, 1, 2, ...; padding to the last one).

    A document ends with eos and nowhere else, so the target after an eos is the first of the next:
    these are the ends that stand in the shard, without another read.
    """
    begins_BL = (tokens_BL == eos_id) & (targets_BL != IGNORED)
    begins_BL[:, 0] = False
    return begins_BL.cumsum(1)


# --- the thread ----------------------------------------------------------------------------------


def _read_ahead(source: Generator[Batch, None, None]) -> Generator[Batch, None, None]:
    """The items of the endless ``source``, read by a thread; what it raises is raised here."""
    ready: queue.Queue[Batch | BaseException] = queue.Queue(READ_AHEAD)
    stop = threading.Event()

    def put(item: Batch | BaseException) -> None:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return

    def work() -> None:
        try:
            with closing(source):
                for batch in source:
                    put(batch)
                    if stop.is_set():
                        return
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=work, name="hourglass-read-ahead", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        with suppress(queue.Empty):
            ready.get_nowait()  # room for a thread that waits to put
        thread.join()
