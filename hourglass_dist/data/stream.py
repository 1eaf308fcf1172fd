"""Batches of rows in the order of ``order.py``.

    plan, step  ->  ranks_cut  ->  locate_many  ->  ShardReader.fill  ->  Batch, read ahead

The whole state of a stream is the number of rows consumed by completed steps and the plan: nothing
is stored elsewhere, so a run continues exactly where it stopped, on any number of ranks.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from hourglass_dist.data.batch import Batch, Buffers, number_documents
from hourglass_dist.data.data_plan import DataPlan
from hourglass_dist.data.mixture import Dataset
from hourglass_dist.data.order import Int64s, Locations, epochs_read, locate_many, ranks_cut
from hourglass_dist.data.shards import ShardReader, split_rows

READ_AHEAD = 4
"""Maximum number of batches that are read ahead."""
LOCATED_AT_ONCE = 16
"""Number of steps whose rows are located together."""
LOOK_AHEAD = 256
"""Maximum number of steps by which a remote shard is downloaded ahead of its first row."""


class Stream:
    """Stream of the training rows of one rank."""

    def __init__(
        self,
        datasets: Sequence[Dataset],
        plan: DataPlan,
        rank: int = 0,
        world_size: int = 1,
        *,
        isolate_documents: bool = False,
        skip: Collection[str] = (),
        pin: bool = False,
    ) -> None:
        """Verify this rank's share of the shards (size and sha256).

        Rows of shards in ``skip`` (SOURCE/FILE) have no targets. ``isolate_documents`` adds each
        target's document to batches; ``pin`` is for GPUs. Raises ValueError when a shard is not as
        in its manifest, or ``world_size`` does not divide a batch of the plan.
        """
        for phase in plan.phases:
            ranks_cut(0, phase.batch_size, world_size, rank)
        self.plan, self.skip = plan, sorted(set(skip))
        self._datasets = datasets
        self._rank, self._world_size = rank, world_size
        self._isolate_documents, self._pin = isolate_documents, pin
        require_known(self.skip, datasets)
        for dataset in datasets:
            dataset.store.check("train", (rank, world_size), self._skipped(dataset))
        self._history: list[tuple[int, list[str]]] = [(0, self.skip)] if self.skip else []

    def _skipped(self, dataset: Dataset) -> list[str]:
        parts = [name.partition("/") for name in self.skip]
        return [path for source, _, path in parts if source == dataset.name]

    def batches(self, start_step: int = 0) -> Generator[Batch, None, None]:
        """Yield this rank's batches without end from ``start_step`` on (0 is the first step).

        A thread reads ahead; it ends when the generator is closed or collected.
        """
        self.plan.first_row(start_step)  # refuses a negative one
        return _read_ahead(self.read(start_step))

    def read(self, step: int) -> Generator[Batch, None, None]:
        """Yield the same as ``batches`` without a thread."""
        with ExitStack() as stack:
            readers: list[ShardReader] = []
            buffers = Buffers()
            ahead = _Ahead(self._datasets, self.plan, self._rows, self.skip)
            for now, ns, found in self._located(step):
                ahead.now_at(now)
                phase = self.plan.phase(now)
                if not readers or readers[0].seq_len != phase.seq_len:
                    stack.close()
                    readers = [
                        stack.enter_context(closing(r)) for r in self._readers(phase.seq_len)
                    ]
                rows = found.sources, found.shards, found.rows
                batch = _batch(readers, *rows, ns, self._isolate_documents, buffers)
                yield batch.pinned() if self._pin else batch

    def _located(self, step: int) -> Iterator[tuple[int, Int64s, Locations]]:
        """Yield (step, numbers of this rank's rows, their positions) from ``step`` on, without end.
        Rows are located for some steps at a time, which is faster."""
        while True:
            ns = [self._rows(s) for s in range(step, step + LOCATED_AT_ONCE)]
            ends = np.cumsum([len(rows) for rows in ns])[:-1]
            found = locate_many(self.plan, np.concatenate(ns))
            columns = (found.sources, found.epochs, found.shards, found.rows)
            parts = zip(*(np.split(column, ends) for column in columns), strict=True)
            for s, rows, part in zip(range(step, step + len(ns)), ns, parts, strict=True):
                yield s, rows, Locations(*part)
            step += LOCATED_AT_ONCE

    def _rows(self, step: int) -> Int64s:
        """Return the numbers of this rank's rows of a step."""
        n, batch_size = self.plan.first_row(step), self.plan.phase(step).batch_size
        cut = ranks_cut(n, batch_size, self._world_size, self._rank)
        return np.arange(cut.start, cut.stop, dtype=np.int64)

    def rows_of(self, step: int) -> range:
        """Return the numbers of all ranks' rows of a step."""
        return range(self.plan.first_row(step), self.plan.first_row(step + 1))

    def _readers(self, seq_len: int) -> list[ShardReader]:
        return [
            ShardReader(
                dataset.manifest, "train", seq_len, store=dataset.store, skip=self._skipped(dataset)
            )
            for dataset in self._datasets
        ]

    def epochs_read(self, step: int) -> dict[str, float]:
        """Return how often the steps before ``step`` read each source, in epochs."""
        return epochs_read(self.plan, step)

    # State

    def state(self, step: int) -> dict[str, Any]:
        """Return the state after ``step`` completed steps, for JSON."""
        skipped = [[row, list(names)] for row, names in self._history]
        return self._settings() | {"next_row": self.plan.first_row(step), "skipped": skipped}

    def resume(self, state: dict[str, Any], step: int) -> None:
        """Continue a state after ``step`` steps; newly skipped shards are recorded with their row.

        Raises ValueError, naming the field, when the state is of another stream than this one.
        """
        ours = self._settings() | {"next_row": self.plan.first_row(step)}
        for name, value in ours.items():
            if state.get(name) != value:
                raise ValueError(
                    f"data: {name} differs: the checkpoint has {state.get(name)!r}, "
                    f"this run has {value!r}"
                )
        history = [(int(row), list(names)) for row, names in state["skipped"]]
        recorded = set(history[-1][1]) if history else set()
        if forgotten := sorted(recorded.difference(self.skip)):
            raise ValueError(
                f"data.skip_shards: {forgotten[0]} has been left out since row "
                f"{next(row for row, names in history if forgotten[0] in names)}: name it again"
            )
        if recorded != set(self.skip):
            history.append((ours["next_row"], self.skip))
        self._history = history

    def identity(self) -> dict[str, str]:
        """Return what must be the same on every rank: manifests, plan and skipped shards."""
        manifests = {f"dataset {d.name}": d.manifest.dataset_id for d in self._datasets}
        return manifests | {"the plan of the data": self.plan.hash, "skip_shards": str(self.skip)}

    def _settings(self) -> dict[str, Any]:
        plan = self.plan
        return {
            "datasets": {source.name: source.dataset_id for source in plan.sources},
            "seq_len": plan.chunk,
            "lanes": plan.lanes,
            "seed": plan.seed,
            "plan": plan.hash,
        }


class _Ahead:
    """Announces to remote stores which shards a rank reads now and soon."""

    def __init__(
        self,
        datasets: Sequence[Dataset],
        plan: DataPlan,
        rows: Callable[[int], Int64s],
        skip: Collection[str],
    ) -> None:
        self._shards = [dataset.manifest.split("train") for dataset in datasets]
        self._datasets, self._plan, self._rows, self._skip = datasets, plan, rows, skip
        largest = max(max(source.rows_per_shard) for source in plan.sources)
        self._horizon = min(LOOK_AHEAD, largest * plan.chunk // plan.phases[0].seq_len)
        self._until: dict[tuple[int, int], int] = {}

    def now_at(self, step: int) -> None:
        """Announce the shards of a step and of later ones. Raises what ``Store.expect`` raises."""
        if not any(dataset.is_remote for dataset in self._datasets):
            return
        before = set(self._until)
        closer = [1, 2, 3, 4, 6, 8, 12, 16, 32, 64, 128] if not before else []
        for ahead in sorted({0, self._horizon, *(d for d in closer if d < self._horizon)}):
            found = locate_many(self._plan, self._rows(step + ahead))
            for pair in dict.fromkeys(
                zip(found.sources.tolist(), found.shards.tolist(), strict=True)
            ):
                self._until[pair] = step + ahead + self._horizon
        for pair in [pair for pair, until in self._until.items() if until < step]:
            del self._until[pair]
        if set(self._until) != before:
            for source, dataset in enumerate(self._datasets):
                wanted = [self._shards[s][shard] for s, shard in self._until if s == source]
                dataset.store.expect(
                    [w for w in wanted if f"{dataset.name}/{w.path}" not in self._skip]
                )


def require_known(skip: Collection[str], datasets: Sequence[Dataset]) -> None:
    """Raise ValueError when ``skip`` names an unknown training shard, or all shards of a source."""
    known = {d.name: {s.path for s in d.manifest.split("train")} for d in datasets}
    for name in skip:
        source, _, path = name.partition("/")
        if path not in known.get(source, ()):
            raise ValueError(
                f"data.skip_shards: no training shard {name!r}; expected SOURCE/FILE such as "
                f"{datasets[0].name}/{min(known[datasets[0].name])}"
            )
    for source, paths in known.items():
        if all(f"{source}/{path}" in skip for path in paths):
            raise ValueError(f"data.skip_shards: leaves nothing of source {source}")


def _batch(
    readers: Sequence[ShardReader],
    sources: Int64s,
    shards: Int64s,
    rows: Int64s,
    ids: Int64s,
    isolate_documents: bool,
    buffers: Buffers,
) -> Batch:
    ids_BM = np.empty((len(ids), readers[0].seq_len + 1), readers[0].dtype)
    real_B = np.empty(len(ids), np.int64)
    for source, reader in enumerate(readers):
        here = np.flatnonzero(sources == source)
        if len(here):
            real_B[here] = reader.fill(ids_BM, here, shards[here], rows[here])
    lent = buffers.take(len(ids), readers[0].seq_len)
    split_rows(ids_BM, real_B, lent[0], lent[1])
    tokens_BL, targets_BL = torch.from_numpy(lent)
    documents_BL = (
        number_documents(tokens_BL, targets_BL, readers[0].eos_id) if isolate_documents else None
    )
    return Batch(tokens_BL, targets_BL, ids, documents_BL)


# --- the thread ----------------------------------------------------------------------------------


def _read_ahead(source: Generator[Batch, None, None]) -> Generator[Batch, None, None]:
    """Yield the items of the endless ``source``, read by a thread; raise its exceptions."""
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
            begun = time.perf_counter()
            item = ready.get()
            if isinstance(item, Exception):
                raise item
            if isinstance(item, BaseException):  # such as SystemExit in the thread
                raise OSError(f"the thread that reads data ended: {item!r}") from item
            yield replace(item, waited_s=time.perf_counter() - begun)
    finally:
        stop.set()
        with suppress(queue.Empty):
            ready.get_nowait()  # room for a thread that waits to put
        thread.join()
