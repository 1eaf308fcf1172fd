"""Held-out text of a run, in windows: every token is a target exactly once.

    rows of `stride` tokens, in their order    |----|----|----|----|----|
    the first window: all its targets count    [xxxxxxxxxxxxxx]
    the next ones: the last `stride` count          [.........xxxx]
                                                         [.........xxxx]

So a target has at least ``context - stride`` tokens before it, or all that exist. Where the stride
equals the context, windows are the rows that training reads (``docs/data.md``): the token before a
block counts as end of text. Windows cross blocks and shards, but not datasets.

Legend: B windows of a batch, L = context, S = stride, K = L / S, R rows of S tokens, M = S + 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing

import numpy as np
import torch

from hourglass_dist.data.batch import Batch, Buffers, number_documents
from hourglass_dist.data.manifest import Split
from hourglass_dist.data.mixture import Dataset
from hourglass_dist.data.shards import IGNORED, Int64s, ShardReader

SPLIT: Split = "heldout"


def held_out_rows(
    datasets: Sequence[Dataset],
    context: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    isolate_documents: bool = False,
    stride: int | None = None,
) -> Iterator[Batch]:
    """Return the held-out text of all datasets that have some, once and in order, in batches of
    windows of ``context`` tokens that are ``stride`` (None: ``context``) apart.

    Each rank reads a contiguous part. All ranks get the same number of batches of the same shapes:
    a rank with one window fewer gets one with all targets -100. ``Batch.sources_B`` indexes
    ``datasets``. The last batch is smaller when ``batch_size`` does not divide the windows. This
    rank's share of the shards is verified at the call. Raises ValueError as ``Stream`` does, when
    the stride does not divide the context or a block, and when no dataset has held-out rows.
    """
    stride = stride or context
    if context % stride:
        raise ValueError(f"stride: {stride} does not divide the context of {context} tokens")
    numbers = [
        n for n, d in enumerate(datasets) if any(s.split == SPLIT for s in d.manifest.shards)
    ]
    texts = [_Text(n, datasets[n], context, stride) for n in numbers or range(len(datasets))]
    for number in numbers:
        datasets[number].store.check(SPLIT, (rank, world_size), ())
    total = sum(text.windows for text in texts)
    begin, end = total * rank // world_size, total * (rank + 1) // world_size
    ids = np.full(-(-total // world_size), -1, dtype=np.int64)
    ids[: end - begin] = np.arange(begin, end)
    return _batches(texts, ids, batch_size, isolate_documents)


def _batches(
    texts: Sequence[_Text], ids: Int64s, batch_size: int, isolate_documents: bool
) -> Iterator[Batch]:
    ends = np.cumsum([text.windows for text in texts])
    numbers = np.array([text.number for text in texts])
    context, eos_id = texts[0].context, texts[0].reader.eos_id
    buffers = Buffers()
    with ExitStack() as stack:
        for text in texts:
            stack.enter_context(closing(text.reader))
        for first in range(0, len(ids), batch_size):
            some = ids[first : first + batch_size]
            known = np.maximum.accumulate(np.maximum(some, 0))
            at = np.searchsorted(ends, known, side="right")
            inputs_BL, targets_BL = lent = buffers.take(len(some), context)
            scored_BL = np.zeros((len(some), context), np.bool_)
            for index, text in enumerate(texts):
                here = np.flatnonzero(at == index)
                if len(here):
                    windows = known[here] - (ends[index] - text.windows)
                    text.read(windows, here, inputs_BL, targets_BL, scored_BL)
            tokens, targets = torch.from_numpy(lent)
            documents = number_documents(tokens, targets, eos_id) if isolate_documents else None
            scored_BL[some < 0] = False
            targets_BL[~scored_BL] = IGNORED
            yield Batch(tokens, targets, some, documents, sources_B=numbers[at])


class _Text:
    """Windows of one dataset."""

    def __init__(self, number: int, dataset: Dataset, context: int, stride: int) -> None:
        block, folder = dataset.manifest.block_tokens, dataset.manifest.folder
        if stride < context and block % stride:
            raise ValueError(
                f"stride: {stride} does not divide the blocks of {block} tokens of {folder}"
            )
        self.number, self.context = number, context
        self.reader = ShardReader(dataset.manifest, SPLIT, stride, store=dataset.store)
        self._rows = context // stride
        self._ends = np.cumsum(self.reader.rows_per_shard)
        self.windows = max(1, int(self._ends[-1]) - self._rows + 1)

    def read(
        self,
        windows: Int64s,
        places: Int64s,
        inputs_BL: Int64s,
        targets_BL: Int64s,
        scored_BL: np.ndarray,
    ) -> None:
        """Read windows (window w begins at row w) into the rows ``places`` of the arrays. Padding
        targets become -100; ``scored_BL`` marks the targets that count."""
        first = int(windows[0])
        last = min(int(windows[-1]) + self._rows, int(self._ends[-1]))
        ids_RM, real_R = self._read_rows(first, last)
        missing = int(windows[-1]) + self._rows - last  # a text that is shorter than one window
        ids_RM = np.pad(ids_RM, ((0, missing), (0, 0)), constant_values=self.reader.eos_id)
        real_R = np.pad(real_R, (0, missing))
        stride = self.reader.seq_len
        rows_BK = (windows - first)[:, None] + np.arange(self._rows)
        shape = (len(windows), self.context)
        found_BL = ids_RM[rows_BK, 1:].astype(np.int64).reshape(shape)
        inputs_BL[places, 0] = ids_RM[rows_BK[:, 0], 0]
        inputs_BL[places, 1:] = found_BL[:, :-1]
        is_text_BL = (np.arange(stride) < real_R[rows_BK][..., None]).reshape(shape)
        targets_BL[places] = np.where(is_text_BL, found_BL, IGNORED)
        is_new_BL = np.arange(self.context) >= self.context - stride
        scored_BL[places] = is_text_BL & (is_new_BL | (windows == 0)[:, None])

    def _read_rows(self, first: int, last: int) -> tuple[np.ndarray, Int64s]:
        rows = np.arange(first, last)
        shards = np.searchsorted(self._ends, rows, side="right")
        begins = self._ends[shards] - np.array(self.reader.rows_per_shard)[shards]
        ids_RM = np.empty((len(rows), self.reader.seq_len + 1), self.reader.dtype)
        real_R = self.reader.fill(ids_RM, np.arange(len(rows)), shards, rows - begins)
        return ids_RM, real_R
