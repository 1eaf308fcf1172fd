"""Bits per byte: the one figure that compares models across tokenizers.

    bits per byte = nats summed over all targets / ln 2 / bytes of the text those targets stand for

Every token of the held-out split is a target exactly once (``data.stream.held_out_rows``); the
first ones of each row see little context, as they do in training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hourglass_dist import dist
from hourglass_dist.data.shards import Manifest
from hourglass_dist.data.stream import Batch, held_out_rows
from hourglass_dist.data.tokenizer import require_same
from hourglass_dist.export import load_export

Rows = Mapping[str, Tensor | None]
"""``Batch.rows``: the arguments of a model."""


@dataclass(frozen=True)
class Score:
    """The loss over some text."""

    nats: float
    tokens: int
    bytes: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / max(1, self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text."""
        return self.nats / math.log(2) / max(1, self.bytes)


def count_bytes(targets_BL: Tensor, byte_lengths_V: np.ndarray) -> int:
    """Bytes of text that the targets stand for; specials and ignored positions (-100) are none."""
    targets = targets_BL.numpy()
    return int(byte_lengths_V[targets[targets >= 0]].sum())


def evaluate(
    loss: Callable[[Rows], tuple[float, int]],
    batches: Iterable[Batch],
    byte_lengths_V: np.ndarray,
    world: dist.World,
) -> Score:
    """Score this rank's batches with ``loss(batch.rows) -> (nats, targets)`` and sum over ranks."""
    nats, tokens, size = 0.0, 0, 0
    rest = iter(batches)
    while batch := dist.together(lambda: next(rest, None), world.device):
        batch_nats, batch_tokens = loss(batch.rows)
        nats += batch_nats
        tokens += batch_tokens
        size += count_bytes(batch.targets_BL, byte_lengths_V)
    total_nats, total_tokens, total_bytes = dist.sum_over_ranks([nats, tokens, size], world.device)
    return Score(total_nats, int(total_tokens), int(total_bytes))


def evaluate_export(folder: Path, dataset: Path, batch_size: int) -> Score:
    """Score an export on the held-out split of a dataset, in rows of the length it was trained on.

    Raises ValueError when either is damaged or their tokenizers differ.
    """
    model, tokenizer, about = load_export(folder)
    manifest = Manifest.load(dataset)
    require_same(tokenizer.fingerprint, manifest.tokenizer, str(folder), str(dataset))
    world = dist.init()
    model.to(world.device)

    @torch.no_grad()
    def loss(rows: Rows) -> tuple[float, int]:
        there = {name: t.to(world.device) for name, t in rows.items() if t is not None}
        nats, count = model(**there)
        return float(nats), int(count)

    length = int(about["trained"]["data"]["seq_len"])
    isolates = bool(about["trained"]["isolate_documents"])
    rows = held_out_rows(manifest, "heldout", length, batch_size, world.rank, world.size, isolates)
    return evaluate(loss, rows, tokenizer.byte_lengths(), world)
