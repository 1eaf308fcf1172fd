"""Bits per byte, the metric that compares models across tokenizers.

    bits per byte = nats summed over all targets / ln 2 / bytes of the text those targets stand for

Every token of the held-out split is a target exactly once (``data.held_out``). The nats of each
target are summed by source, and by the offset of its position in a bucket of the innermost level.
At offset 0 the inner output of a bucket is new, at offset S-1 it is S-1 tokens old. A healthy model
scores nearly the same at all offsets; one that relies on inner outputs gets worse with the offset.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hourglass_dist.core import ranks
from hourglass_dist.data.batch import Batch
from hourglass_dist.data.held_out import held_out_rows
from hourglass_dist.data.mixture import open_dataset
from hourglass_dist.data.tokenizer import require_same
from hourglass_dist.inference.export import load_export
from hourglass_dist.model.layout import document_positions
from hourglass_dist.model.settings import ModelConfig

Rows = Mapping[str, Tensor | None]
"""Keyword arguments of a model, by name, as in ``Batch.rows``."""


@dataclass(frozen=True)
class Score:
    """Sum of the loss over some text, with its tokens and bytes."""

    nats: float
    tokens: int
    bytes: int

    def __add__(self, other: Score) -> Score:
        return Score(self.nats + other.nats, self.tokens + other.tokens, self.bytes + other.bytes)

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / max(1, self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text."""
        return self.nats / math.log(2) / max(1, self.bytes)


def count_bytes(targets_BL: Tensor, byte_lengths_V: np.ndarray) -> int:
    """Return the bytes of text of the targets; special tokens and ignored ones (-100) have none."""
    targets = targets_BL.numpy()
    return int(byte_lengths_V[targets[targets >= 0]].sum())


@dataclass(frozen=True)
class Evaluation:
    """Scores of one pass over held-out text."""

    sources: dict[str, Score]
    """Score of each source that has held-out text."""
    positions_S: tuple[Score, ...]
    """Score at each offset in a bucket of the innermost level (``t mod S``)."""

    @property
    def whole(self) -> Score:
        """Score over all sources."""
        return sum(self.sources.values(), Score(0.0, 0, 0))

    def by_place(self, stride: int) -> list[Score]:
        """Return the score at each ``t mod stride``, for a divisor of the largest stride. Position
        t counts from the start of the document if documents are isolated, else of the row."""
        assert len(self.positions_S) % stride == 0
        return [sum(self.positions_S[p::stride], Score(0.0, 0, 0)) for p in range(stride)]


def fixed_strides(config: ModelConfig) -> list[int]:
    """Return the stride (tokens under a position) of every level, outermost (1) first, up to the
    first level whose buckets are not of a fixed size."""
    strides = []
    for level, stride in zip(config.levels, config.strides, strict=True):
        if level.pooling != "fixed":
            break
        strides.append(stride)
    return strides


def evaluate(
    nats: Callable[[Rows], Tensor],
    batches: Iterable[Batch],
    byte_lengths_V: np.ndarray,
    world: ranks.World,
    names: Sequence[str] = ("data",),
    stride: int = 1,
) -> Evaluation:
    """Score this rank's held-out batches with ``nats(batch.rows) -> (B, L)``, the nats of each
    target, and sum over ranks.

    ``names`` are the datasets that ``Batch.sources_B`` indexes, ``stride`` is the largest stride.
    """
    sums = np.zeros((3, len(names), stride))
    rest = iter(batches)
    while batch := ranks.raise_on_all_ranks(lambda: next(rest, None), world.device):
        sums += _sums(batch, nats(batch.rows), byte_lengths_V, len(names), stride)
    flat = ranks.sum_over_ranks(sums.ravel().tolist(), world.device)
    total = np.array(flat).reshape(sums.shape)
    by_source, by_place = total.sum(axis=2).T.tolist(), total.sum(axis=1).T.tolist()
    found = {name: _score(row) for name, row in zip(names, by_source, strict=True)}
    sources = {name: score for name, score in found.items() if score.tokens}
    return Evaluation(sources, tuple(map(_score, by_place)))


def _score(sums: Sequence[float]) -> Score:
    nats, tokens, size = sums
    return Score(nats, int(tokens), int(size))


def _sums(
    batch: Batch, nats_BL: Tensor, byte_lengths_V: np.ndarray, names: int, stride: int
) -> np.ndarray:
    """Return nats, number of targets and bytes of a batch, (3, sources, offsets)."""
    assert batch.sources_B is not None
    targets_BL, documents_BL = batch.targets_BL.numpy(), batch.documents_BL
    length = torch.arange(targets_BL.shape[1])[None]
    position_BL = (length if documents_BL is None else document_positions(documents_BL)).numpy()
    cell_BL = batch.sources_B[:, None] * stride + position_BL % stride
    real_BL = targets_BL >= 0
    cells_N = np.broadcast_to(cell_BL, real_BL.shape)[real_BL]
    nats_N = nats_BL.double().cpu().numpy()[real_BL]
    columns = (nats_N, np.ones(len(cells_N)), byte_lengths_V[targets_BL[real_BL]])
    size = names * stride
    counted = [np.bincount(cells_N, weights=column, minlength=size) for column in columns]
    return np.stack(counted).reshape(3, names, stride)


def evaluate_export(
    folder: Path,
    where: str,
    batch_size: int,
    context: int | None = None,
    stride: int | None = None,
) -> tuple[Evaluation, int]:
    """Score an export on the held-out split of a dataset, in windows of ``context`` tokens (None:
    as in training) that begin every ``stride`` tokens (None: ``context``); also return the context.

    Raises ValueError when export or dataset is damaged, their tokenizers differ, or the windows do
    not fit the dataset or the position table.
    """
    model, tokenizer, about = load_export(folder)
    dataset = open_dataset(where)
    require_same(tokenizer.fingerprint, dataset.manifest.tokenizer, str(folder), where)
    context = context or int(about["trained"]["data"]["seq_len"])
    if model.config.max_seq_len is not None and context > model.config.max_seq_len:
        raise ValueError(
            f"context: {context} is longer than the position table of {folder}, "
            f"max_seq_len={model.config.max_seq_len}"
        )
    world = ranks.init()
    model.to(world.device)

    @torch.no_grad()
    def nats(rows: Rows) -> Tensor:
        there = {name: t.to(world.device) for name, t in rows.items() if t is not None}
        nats_BL: Tensor = model(**there, each_target=True)[0]
        return nats_BL

    isolates = bool(about["trained"]["isolate_documents"])
    rows = held_out_rows(
        [dataset], context, batch_size, world.rank, world.size, isolates, stride=stride
    )
    return evaluate(nats, rows, tokenizer.byte_lengths(), world), context
