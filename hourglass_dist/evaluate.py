"""Bits per byte: the one figure that compares models across tokenizers.

    bits per byte = nats summed over all targets / ln 2 / bytes of the text those targets stand for

Every token of the held-out split is a target exactly once (``data.stream.held_out_rows``); the
first ones of each row see little context, as they do in training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hourglass_dist import dist
from hourglass_dist.data.mixture import open_dataset
from hourglass_dist.data.stream import Batch, held_out_rows
from hourglass_dist.data.tokenizer import require_same
from hourglass_dist.export import load_export
from hourglass_dist.model.hourglass import sum_loss


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
    loss: Callable[[Tensor, Tensor], tuple[float, int]],
    batches: Iterable[Batch],
    byte_lengths_V: np.ndarray,
    world: dist.World,
) -> Score:
    """Score this rank's batches with ``loss(tokens_BL, targets_BL) -> (nats, targets)`` and sum
    over ranks."""
    nats, tokens, size = 0.0, 0, 0
    rest = iter(batches)
    while batch := dist.together(lambda: next(rest, None), world.device):
        batch_nats, batch_tokens = loss(batch.tokens_BL, batch.targets_BL)
        nats += batch_nats
        tokens += batch_tokens
        size += count_bytes(batch.targets_BL, byte_lengths_V)
    total_nats, total_tokens, total_bytes = dist.sum_over_ranks([nats, tokens, size], world.device)
    return Score(total_nats, int(total_tokens), int(total_bytes))


def evaluate_export(folder: Path, where: str, batch_size: int) -> Score:
    """Score an export on the held-out split of a dataset, in rows of the length it was trained on.

    Raises ValueError when either is damaged or their tokenizers differ.
    """
    model, tokenizer, about = load_export(folder)
    dataset = open_dataset(where)
    require_same(tokenizer.fingerprint, dataset.manifest.tokenizer, str(folder), where)
    world = dist.init()
    model.to(world.device)

    @torch.no_grad()
    def loss(tokens_BL: Tensor, targets_BL: Tensor) -> tuple[float, int]:
        logits_BLV = model(tokens_BL.to(world.device))
        nats, count = sum_loss(logits_BLV, targets_BL.to(world.device))
        return float(nats), int(count)

    length = int(about["trained"]["data"]["seq_len"])
    rows = held_out_rows([dataset], length, batch_size, world.rank, world.size)
    return evaluate(loss, rows, tokenizer.byte_lengths(), world)
