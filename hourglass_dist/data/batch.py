"""A batch of rows, and the memory that batches take in turn. B: rows, L: tokens in a row."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from hourglass_dist.data.shards import IGNORED, Int64s


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
    waited_s: float = 0.0
    """Seconds that whoever asked for it waited."""
    sources_B: Int64s | None = None
    """Held-out rows: the number of the dataset that each is of."""

    @property
    def rows(self) -> dict[str, Tensor | None]:
        """What a model reads, under the names of its arguments."""
        return {
            "tokens_BL": self.tokens_BL,
            "targets_BL": self.targets_BL,
            "documents_BL": self.documents_BL,
        }

    def pinned(self) -> Batch:
        """The same in page-locked memory, from where a GPU copies while it computes."""
        documents_BL = None if self.documents_BL is None else self.documents_BL.pin_memory()
        tokens_BL, targets_BL = self.tokens_BL.pin_memory(), self.targets_BL.pin_memory()
        return replace(self, tokens_BL=tokens_BL, targets_BL=targets_BL, documents_BL=documents_BL)


class Buffers:
    """Memory for batches, taken again when the batch that had it is gone: fresh memory costs more
    than the reading."""

    def __init__(self) -> None:
        self._free: list[Int64s] = []

    def take(self, rows: int, length: int) -> Int64s:
        """Two matrices in one array. It comes back when the last tensor made of it is gone."""
        shape, found = (2, rows, length), None
        while self._free and found is None:
            last = self._free.pop()
            found = last if last.shape == shape else None
        memory = np.empty(shape, np.int64) if found is None else found
        lent: Int64s = memory.view()
        weakref.finalize(lent, self._free.append, memory).atexit = False
        return lent


def number_documents(tokens_BL: Tensor, targets_BL: Tensor, eos_id: int) -> Tensor:
    """Which document of its row each target belongs to (0, 1, 2, ...; padding to the last one).

    A document ends with eos and nowhere else, so the target after an eos is the first of the next:
    these are the ends that stand in the shard, without another read.
    """
    begins_BL = (tokens_BL == eos_id) & (targets_BL != IGNORED)
    begins_BL[:, 0] = False
    return begins_BL.cumsum(1)
