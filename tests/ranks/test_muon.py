"""Muon on cut matrices does what it would do on whole ones, at every stage and number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import run_cases
from toy import make_batch, make_config, make_model

from hourglass_dist.engine import optim
from hourglass_dist.engine.muon import MOMENTUM, SCALE, orthogonal

MUON = {"name": "muon", "level_lr": [1.0, 0.5]}


def plain_muon(steps: int) -> list[float]:
    """The oracle: one process, whole matrices, the batch at once."""
    config = make_config(0, **MUON)
    model = make_model(config)
    groups = optim.parameter_groups(model, config.optim)
    adamw = torch.optim.AdamW(
        [group for group in groups if not group["muon"]],
        betas=(config.optim.beta1, config.optim.beta2),
    )
    hidden = [group for group in groups if group["muon"]]
    momentum = {p: torch.zeros_like(p) for group in hidden for p in group["params"]}
    losses = []
    for step in range(steps):
        tokens, targets = make_batch(step, config)
        nll, count = model(tokens, targets_BL=targets)
        model.zero_grad()
        (nll / targets.numel()).backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        torch.nn.utils.clip_grad_norm_(trained, config.optim.clip_grad_norm)
        lr = optim.learning_rate(step, config.optim, config.train.steps)
        for group in adamw.param_groups:
            group["lr"] = lr * group["lr_scale"]
        adamw.step()
        with torch.no_grad():
            for group in hidden:
                for p in group["params"]:
                    momentum[p] = MOMENTUM * momentum[p] + (1 - MOMENTUM) * p.grad
                    ahead = (1 - MOMENTUM) * p.grad + MOMENTUM * momentum[p]
                    rate = lr * group["lr_scale"]
                    p -= rate * (orthogonal(ahead) + group["weight_decay"] * p)
        losses.append(nll.item() / int(count))
    return losses


@pytest.mark.slow
def test_every_stage_agrees_with_whole_matrices(tmp_path: Path) -> None:
    """And the state moves: from two ranks at stage 2 to four at stages 1 and 3."""
    expected = plain_muon(9)
    folder = str(tmp_path / "state")
    cases: list[dict[str, Any]] = [{"stage": s, "steps": 9, "optim": MUON} for s in range(4)]
    cases += [{"stage": 1, "steps": 9, "optim": MUON, "precision": "bf16"}]
    cases += [{"stage": 2, "steps": 6, "optim": MUON, "save": folder}]
    *exact, bf16, saved = run_cases(tmp_path, 2, cases)
    for result in exact:
        assert result["losses"] == pytest.approx(expected, abs=1e-5)
    assert bf16["losses"] == pytest.approx(expected, abs=0.05)
    assert saved["losses"] == exact[2]["losses"][:6]
    moved = [{"stage": s, "first": 6, "steps": 9, "optim": MUON, "load": folder} for s in (1, 3)]
    for result in run_cases(tmp_path, 4, moved):
        assert result["losses"] == pytest.approx(expected[6:], abs=1e-5)


@pytest.mark.parametrize("shape", [(24, 24), (8, 50), (50, 8)])
def test_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(matrix)) / (SCALE * max(shape) ** 0.5)
    assert values.min() > 0.3
    assert values.max() < 1.3
