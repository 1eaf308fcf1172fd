"""Settings of a run that takes seconds, and what to compare of such runs."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from hourglass_dist.engine import sharded_state

TINY = """
run: {dir: runs/tiny}
data: {dataset: data/tiny, seq_len: 64, batch_size: 8}
model:
  dim: 32
  heads: 2
  dim_head: 16
  max_seq_len: 64
  levels:
    - {layers: [1, 1]}
    - {layers: 2, shorten: 2}
optim: {lr: 1e-3, warmup_steps: 5}
train: {steps: 20, micro_batch_size: 2}
eval: {every: 20, batch_size: 64}
checkpoint: {every: 5}
metrics: {every: 1}
"""

PERSIST = "stage3_param_persistence_threshold: 0"  # or weights this small are not partitioned


def losses(run: Path) -> dict[int, float]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {r["step"]: r["train/loss"] for r in records if "train/loss" in r}


def state(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint: weights and moments."""
    reader = sharded_state.Reader(run / "checkpoints" / f"step_{step:08d}")
    kinds = ("fp32", "exp_avg", "exp_avg_sq", "frozen")
    return {f"{k}/{name}": reader.full(k, name) for k in kinds for name in reader.names(k)}
