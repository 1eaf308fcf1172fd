"""Engines on several ranks, and what they leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from ranks import run_worker

from hourglass_dist.engine import optim, sharded_state


def run_cases(tmp_path: Path, ranks: int, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    out = tmp_path / f"out-{ranks}.json"
    run_worker(ranks, "engine_worker.py", out, json.dumps(cases))
    results: list[dict[str, Any]] = json.loads(out.read_text())
    return results


def whole_state(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a state, whichever ranks wrote which part."""
    reader = sharded_state.Reader(folder)
    kinds = ("fp32", *optim.ADAMW_MOMENTS, "frozen")
    tensors = {f"{kind}/{n}": reader.full(kind, n) for kind in kinds for n in reader.names(kind)}
    return tensors | {"steps": torch.tensor(reader.optimizer_steps)}
