"""Checkpoints of a state of two pieces, without an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hourglass_dist.checkpoint.save import Checkpoints, TrainingProgress
from hourglass_dist.config.schema import CheckpointConfig
from hourglass_dist.core import ranks
from hourglass_dist.engine import sharded_state
from hourglass_dist.engine.sharded_state import Key

BUFFERS = sharded_state.PinnedBuffers()


def take() -> sharded_state.Snapshot:
    weight = torch.arange(600.0)
    pieces = {Key("fp32", "w", 0): weight[:400], Key("fp32", "w", 400): weight[400:]}
    return BUFFERS.snapshot(pieces.items(), {"w": (20, 30)}, optimizer_steps=7, loss_scale={})


def make(folder: Path, **settings: Any) -> Checkpoints:
    config = CheckpointConfig(every=5, keep=settings.pop("keep", 2), **settings)
    return Checkpoints(folder, config, ranks.init())


def progress(step: int, score: float | None = None) -> TrainingProgress:
    data = {"next_row": step * 4}
    return TrainingProgress(step, data, {"model_sha256": "a", "vocab_sha256": "b"}, 1, score)


def save(checkpoints: Checkpoints, step: int, score: float | None = None) -> None:
    checkpoints.save(take, progress(step, score))
    checkpoints.finish()
