"""How fast a dataset is read, beside what the machine can do with the same rows.

    raw       the bytes of the rows, in the order of training, into memory: nothing is faster
    batches   the same rows as training gets them: located, read, split into inputs and targets
    locate    rows found in the order, nothing read

On one core, in alternating rounds, so that a busy machine slows all of them; the best round of each
counts. Files are in the page cache after the first round, as far as it holds them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from itertools import islice

import numpy as np

from hourglass_dist.data.mixture import Dataset, open_dataset, simple_plan
from hourglass_dist.data.order import Int64s, Locations, locate_many
from hourglass_dist.data.shards import ShardReader
from hourglass_dist.data.stream import Stream

ROUNDS = 20


@dataclass(frozen=True)
class DataSpeed:
    """Of one core; the files' hashes, which a run checks at its start, are not counted."""

    raw: float
    """Tokens a second."""
    batches: float
    """Tokens a second."""
    locate: float
    """Rows a second."""
    cold_start: float
    """Seconds from an open dataset to a batch in the middle of an epoch."""

    def __str__(self) -> str:
        return (
            f"raw         {self.raw / 1e6:10,.0f} million tokens/s\n"
            f"batches     {self.batches / 1e6:10,.0f} million tokens/s, "
            f"{self.batches / self.raw:.2f} of raw\n"
            f"locate      {self.locate / 1e6:10,.2f} million rows/s\n"
            f"cold start  {self.cold_start * 1e3:10,.1f} ms to the first batch"
        )


def bench_data(where: str, seq_len: int, batch_size: int, steps: int) -> DataSpeed:
    """Read ``steps`` batches of one rank in each round.

    Raises ValueError when the dataset is damaged or ``seq_len`` does not divide its blocks.
    """
    dataset = open_dataset(where)
    plan = simple_plan(dataset, seq_len, batch_size, seed=0)
    stream = Stream([dataset], plan)

    def rows(step: int) -> Int64s:
        return np.arange(step * batch_size, (step + 1) * batch_size)

    def locate() -> None:
        for step in range(steps):
            locate_many(plan, rows(step))

    def batches() -> None:
        with closing(stream.read(0)) as reading:
            for _ in islice(reading, steps):
                pass

    begun = time.perf_counter()
    with closing(stream.read(plan.sources[0].rows // 2 // batch_size)) as reading:
        next(reading)
    cold_start = time.perf_counter() - begun
    raw = raw_reads(dataset, seq_len, [locate_many(plan, rows(step)) for step in range(steps)])
    best = [0.0] * 3
    for _ in range(ROUNDS):
        for index, work in enumerate((raw, batches, locate)):
            begun = time.perf_counter()
            work()
            best[index] = max(best[index], steps * batch_size / (time.perf_counter() - begun))
    return DataSpeed(best[0] * seq_len, best[1] * seq_len, best[2], cold_start)


def raw_reads(dataset: Dataset, seq_len: int, batches: list[Locations]) -> Callable[[], None]:
    """A function that reads the rows of all batches, one after the other, and does no more."""
    shards = dataset.manifest.split("train")
    files = [dataset.store.open(shard) for shard in shards]
    reader = ShardReader(dataset.manifest, "train", seq_len)
    size = seq_len * reader.dtype.itemsize
    places = []
    for found in batches:
        blocks, starts = np.divmod(found.rows * seq_len, dataset.manifest.block_tokens)
        for shard, block, start in zip(found.shards, blocks, starts, strict=True):
            offset = shards[shard].offsets[block] + int(start) * reader.dtype.itemsize
            places.append((files[shard], offset))
    buffer = [bytearray(size)]

    def work() -> None:
        for file, offset in places:
            os.preadv(file, buffer, offset)

    return work
