"""Numbers from inside a step are those of plain PyTorch, at every ZeRO stage, and cost no digit."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from level_stats_worker import STEPS
from ranks import run_worker
from toy import make_batch, make_config, make_model
from zoo import KINDS, random_text, with_policy
from zoo import make_model as make_kind

from hourglass_dist.engine import optim
from hourglass_dist.model.head import Output
from hourglass_dist.model.hourglass import Hourglass
from hourglass_dist.planning.parameters import parameters_of
from hourglass_dist.training.level_stats import part_of


def plain_pytorch() -> list[dict[str, float]]:
    """The oracle: one process, the whole batch at once, gradients before clipping. Activations are
    those of the rows that the two ranks have in their last micro batch."""
    config = make_config(0)
    model = make_model(config)
    groups = optim.parameter_groups(model, config.optim)
    adam = (config.optim.beta1, config.optim.beta2)
    optimizer = torch.optim.AdamW(groups, betas=adam, eps=config.optim.eps)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    streams: dict[str, torch.Tensor] = {}
    for level in (m for m in model.modules() if isinstance(m, Hourglass)):
        level.register_forward_hook(
            lambda m, _, x_BLD: streams.update({f"activation_rms/level_{m.index}": x_BLD.detach()})
        )
    seen = []
    for step in range(STEPS):
        tokens, targets = make_batch(step, config)
        for group in optimizer.param_groups:
            group["lr"] = optim.learning_rate(step, config.optim, config.train.steps)
        nll, _ = model(tokens, targets_BL=targets)
        (nll / targets.numel()).backward()
        squares: dict[str, float] = defaultdict(float)
        for name, p in trained.items():
            assert p.grad is not None
            squares[f"grad_norm/{part_of(name)}"] += float(p.grad.square().sum())
            for part in (part_of(name), "all"):
                squares[f"param_norm/{part}"] += float(p.detach().square().sum())
        last_micro_batches = tokens[[4, 5, 6, 7, 12, 13, 14, 15]]
        with torch.no_grad():
            logits = model(last_micro_batches)
        torch.nn.utils.clip_grad_norm_(list(trained.values()), config.optim.clip_grad_norm)
        before = {name: p.detach().clone() for name, p in trained.items()}
        optimizer.step()
        optimizer.zero_grad()
        for name, p in trained.items():
            for part in (part_of(name), "all"):
                squares[f"update_norm/{part}"] += float((before[name] - p.detach()).square().sum())
        values = {name: math.sqrt(square) for name, square in squares.items()}
        values |= {name: float(x.square().mean().sqrt()) for name, x in streams.items()}
        seen.append(values | {"logits/largest": float(logits.abs().max())})
    return seen


@pytest.mark.slow
def test_norms_by_level_are_those_of_plain_pytorch(tmp_path: Path) -> None:
    """Two ranks, accumulation, clipping, frozen weights, recomputation; losses without level_stats
    are the same to the last bit."""
    cases = [{"stage": s, "watch": watch} for s in range(4) for watch in (True, False)]
    cases += [{"stage": 1, "watch": True, "precision": "bf16"}]
    run_worker(2, "level_stats_worker.py", tmp_path / "out.json", json.dumps(cases))
    results: list[dict[str, Any]] = json.loads((tmp_path / "out.json").read_text())
    expected = plain_pytorch()
    for watched, unwatched in zip(results[:8:2], results[1:8:2], strict=True):
        assert watched["losses"] == unwatched["losses"]
        for seen, oracle in zip(watched["seen"], expected, strict=True):
            assert {name: seen[name] for name in oracle} == pytest.approx(oracle, rel=2e-4)
            parts = [value for name, value in seen.items() if name.startswith("grad_norm/")]
            assert math.hypot(*parts) == pytest.approx(seen["all"])
            for part in ("level_0", "level_1", "ends", "all"):
                ratio = seen[f"update_norm/{part}"] / seen[f"param_norm/{part}"]
                assert seen[f"update_ratio/{part}"] == pytest.approx(ratio)
        assert not any(name.startswith("grad_norm/") for name in unwatched["seen"][0])
    for watched in results[8:]:
        for seen, oracle in zip(watched["seen"], expected, strict=True):
            assert {name: seen[name] for name in oracle} == pytest.approx(oracle, rel=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_has_the_part_that_its_cost_is_in(kind: str) -> None:
    model = make_kind(kind, "by 2, 4")
    found: dict[str, int] = defaultdict(int)
    for name, parameter in model.named_parameters():
        found[part_of(name)] += parameter.numel()
    parameters = parameters_of(model.config)
    levels = {f"level_{n}": parameters.of_level(n) for n in range(len(model.config.levels))}
    assert dict(found) == levels | {"ends": parameters.of_level(None)}


@pytest.mark.slow
def test_the_largest_logit_in_a_compiled_model() -> None:
    """Watching changes no loss and breaks no graph."""
    model = with_policy(make_kind("lucidrains", "by 2"), "full")
    output = next(module for module in model.modules() if isinstance(module, Output))
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    rows = {"tokens_BL": random_text(2, 26, 0), "targets_BL": random_text(2, 26, 1)}
    plain, _ = compiled(**rows)
    output.watched = True
    watched, _ = compiled(**rows)
    watched.backward()
    assert torch.equal(plain, watched)
    assert output.largest_logit is not None
    assert float(output.largest_logit) == pytest.approx(
        float(model(rows["tokens_BL"]).detach().abs().max()), rel=1e-5
    )
