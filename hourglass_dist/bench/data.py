"""``hourglass bench data``: the speed of reading a dataset, beside plain reads of the same rows.

    raw       the bytes of the rows, read in the order of training into memory: the upper bound
    batches   the same rows as training gets them: located, read, split into inputs and targets
    locate    the positions of the rows in the order, without reading

All on one core, in alternating rounds. Each rate is that of the median batch, which other work on
the machine hardly changes. After the first round the files are in the page cache, if they fit.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from statistics import median

import numpy as np

from hourglass_dist.data.mixture import Dataset, open_dataset, simple_plan
from hourglass_dist.data.order import Int64s, Locations, locate_many
from hourglass_dist.data.shards import ShardReader
from hourglass_dist.data.stream import Stream

ROUNDS = 10


@dataclass(frozen=True)
class DataSpeed:
    """The speeds of one core, without the hashing of files at the start of a run."""

    raw: float
    """Speed of plain reads, tokens/s."""
    batches: float
    """Speed of training's batches, tokens/s."""
    locate: float
    """Speed of locating rows, rows/s."""
    cold_start: float
    """Time from an open dataset to a batch in the middle of an epoch, seconds."""

    def __str__(self) -> str:
        return (
            f"raw         {self.raw / 1e6:10,.0f} million tokens/s\n"
            f"batches     {self.batches / 1e6:10,.0f} million tokens/s, "
            f"{self.batches / self.raw:.2f} of raw\n"
            f"locate      {self.locate / 1e6:10,.2f} million rows/s\n"
            f"cold start  {self.cold_start * 1e3:10,.1f} ms to the first batch"
        )


def bench_data(where: str, seq_len: int, batch_size: int, steps: int) -> DataSpeed:
    """Read ``steps`` batches of one rank in each round, and return the speeds.

    Raises ValueError when the dataset is damaged or ``seq_len`` does not divide its blocks.
    """
    dataset = open_dataset(where)
    plan = simple_plan(dataset, seq_len, batch_size, seed=0)
    stream = Stream([dataset], plan)

    def rows(step: int) -> Int64s:
        return np.arange(step * batch_size, (step + 1) * batch_size)

    def locate() -> Iterator[Locations]:
        return (locate_many(plan, rows(step)) for step in range(steps))

    begun = time.perf_counter()
    with closing(stream.read(plan.sources[0].rows // 2 // batch_size)) as reading:
        next(reading)
    cold_start = time.perf_counter() - begun
    raw = raw_reads(dataset, seq_len, list(locate()))
    works: tuple[Callable[[], Iterator[object]], ...]
    works = (raw, lambda: islice(stream.read(0), steps), locate)
    seconds: list[list[float]] = [[], [], []]
    for _ in range(ROUNDS):
        for times, work in zip(seconds, works, strict=True):
            running, begun = iter(work()), time.perf_counter()
            for _ in running:
                times.append((now := time.perf_counter()) - begun)
                begun = now
    rates = [batch_size / median(times) for times in seconds]
    return DataSpeed(rates[0] * seq_len, rates[1] * seq_len, rates[2], cold_start)


def raw_reads(
    dataset: Dataset, seq_len: int, batches: list[Locations]
) -> Callable[[], Iterator[None]]:
    """Return a function that reads the rows of one batch after the other with plain preadv."""
    shards = dataset.manifest.split("train")
    files = [dataset.store.open(shard) for shard in shards]
    reader = ShardReader(dataset.manifest, "train", seq_len)
    buffer = [bytearray(seq_len * reader.dtype.itemsize)]
    places = []
    for found in batches:
        blocks, starts = np.divmod(found.rows * seq_len, dataset.manifest.block_tokens)
        places.append(
            [
                (files[shard], shards[shard].offsets[block] + int(start) * reader.dtype.itemsize)
                for shard, block, start in zip(found.shards, blocks, starts, strict=True)
            ]
        )

    def work() -> Iterator[None]:
        for batch in places:
            for file, offset in batch:
                os.preadv(file, buffer, offset)
            yield

    return work
