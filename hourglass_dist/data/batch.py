"""A batch of rows, and reusable memory for batches. B: rows, L: tokens in a row."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from hourglass_dist.data.shards import IGNORED, Int64s


@dataclass(frozen=True)
class Batch:
    """Training or held-out rows of one rank. B: rows, L: tokens in a row."""

    tokens_BL: Tensor
    """Token id before each target, int64."""
    targets_BL: Tensor
    """Token id to predict, int64; -100 at positions without a target."""
    row_ids: Int64s
    """Numbers of all B rows; -1 for rows that only pad the batch of a rank."""
    documents_BL: Tensor | None = None
    """Index within the row (0, 1, 2, ...) of the document of each target, int64. None where
    documents are not isolated."""
    waited_s: float = 0.0
    """Time that the caller waited for the batch, seconds."""
    sources_B: Int64s | None = None
    """Index of the dataset of each held-out row; None for training rows."""

    @property
    def rows(self) -> dict[str, Tensor | None]:
        """Inputs of the model by argument name."""
        return {
            "tokens_BL": self.tokens_BL,
            "targets_BL": self.targets_BL,
            "documents_BL": self.documents_BL,
        }

    def pinned(self) -> Batch:
        """Return a copy in page-locked memory, which a GPU copies from asynchronously."""
        documents_BL = None if self.documents_BL is None else self.documents_BL.pin_memory()
        tokens_BL, targets_BL = self.tokens_BL.pin_memory(), self.targets_BL.pin_memory()
        return replace(self, tokens_BL=tokens_BL, targets_BL=targets_BL, documents_BL=documents_BL)


class Buffers:
    """Pool of memory for batches, reused when a batch is freed: fresh memory costs more than the
    reading."""

    def __init__(self) -> None:
        self._free: list[Int64s] = []

    def take(self, rows: int, length: int) -> Int64s:
        """Return an int64 array (2, rows, length), reused after its last tensor is freed."""
        shape, found = (2, rows, length), None
        while self._free and found is None:
            last = self._free.pop()
            found = last if last.shape == shape else None
        memory = np.empty(shape, np.int64) if found is None else found
        lent: Int64s = memory.view()
        weakref.finalize(lent, self._free.append, memory).atexit = False
        return lent


def number_documents(tokens_BL: Tensor, targets_BL: Tensor, eos_id: int) -> Tensor:
    """Return the index within its row of the document of each target, (B, L); padding has the last.

    A document ends with eos and nowhere else, so the target after an eos is the first of the next
    document. This needs no second read of the shard.
    """
    begins_BL = (tokens_BL == eos_id) & (targets_BL != IGNORED)
    begins_BL[:, 0] = False
    return begins_BL.cumsum(1)
