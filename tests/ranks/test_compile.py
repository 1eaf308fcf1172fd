"""``torch.compile`` takes every kind of model whole, and layer by layer: no graph break, no second
compilation."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import hourglass, kill_tree, start_torchrun, torchrun, wait_for_step
from slow_cases import every
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from zoo import documents_of, farthest, make_model, random_text, with_policy

from hourglass_dist.core.records import read_jsonl
from hourglass_dist.model.hourglass import HourglassLM

ZERO = "deepspeed.zero_optimization"


@pytest.mark.parametrize(
    ("kind", "policy"),
    every(3, [("modern, words", "selective"), ("lucidrains", "none"), ("paper, words", "full")]),
)
def test_one_graph_for_all_batches_of_a_shape(kind: str, policy: str) -> None:
    """Other texts have other words and documents; the shapes stay, and so does the graph."""
    torch._dynamo.reset()
    plain = make_model(kind, "by 2")
    model = with_policy(plain, policy)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=False)
    for rows in (packed(0, 4, 9, 1, 12), packed(3, 13, 13)):
        assert_same_gradients(plain, model, compiled, rows)
    assert counter.frame_count == 1


def packed(seed: int, *lengths: int) -> dict[str, Tensor]:
    return {
        "tokens_BL": random_text(2, 26, seed),
        "targets_BL": random_text(2, 26, seed + 1),
        "documents_BL": documents_of(*lengths).expand(2, -1),
    }


def assert_same_gradients(
    plain: HourglassLM, model: HourglassLM, compiled: Any, rows: dict[str, Tensor]
) -> None:
    """``compiled`` has the weights of ``model``."""
    model.zero_grad()
    plain.zero_grad()
    torch.manual_seed(3)
    nats, _ = compiled(**rows)
    nats.backward()
    torch.manual_seed(3)
    expected, _ = plain(**rows)
    expected.backward()
    torch.testing.assert_close(nats, expected)
    for (name, one), other in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None and other.grad is not None:
            assert farthest(one.grad, other.grad) < 1e-9, name


@pytest.mark.parametrize("kind", every(3, ["lucidrains", "paper, words", "modern, words"]))
@pytest.mark.parametrize("policy", every(4, ["full", "none", "selective", "offload"]))
def test_layers_of_one_shape_share_a_graph(
    kind: str, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two layers outside, two inside, and the ways in and out: four graphs. Scoring makes none, and
    dropout drops the same numbers when it is done again."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    plain = make_model(kind, "by 2", dropout=0.3)
    model = with_policy(plain, policy)
    model.compile_layers()
    for rows in (packed(0, 4, 9, 1, 12), packed(3, 13, 13)):
        assert_same_gradients(plain, model, model, rows)
    model.eval()
    model(**packed(5, 26))
    assert counter.frame_count == 4


@pytest.mark.slow
def test_a_compiled_run_goes_on_bit_for_bit(
    tiny_config: Path, dataset: Path, tmp_path: Path
) -> None:
    """Killed on the way, with the losses of one that was not, and nearly those of a plain run."""

    def command(run: str, *more: str) -> list[str]:
        where = [f"data.dataset={dataset}", f"run.dir={tmp_path / run}", "eval.every=8"]
        return ["-m", "hourglass_dist.train", str(tiny_config), *where, *more]

    def losses(run: str) -> dict[int, float]:
        records = read_jsonl(tmp_path / run / "metrics.jsonl")
        return {int(r["step"]): r["train/loss"] for r in records if "train/loss" in r}

    plain = ["model.levels.0.activation_checkpointing=selective", f"{ZERO}.stage=2"]
    compiled = [*plain, "train.compile=true"]
    for run, more in (("plain", plain), ("whole", compiled)):
        done = torchrun(1, *command(run, *more))
        assert done.returncode == 0, done.stderr[-3000:]
    killed = start_torchrun(1, *command("killed", *compiled))
    wait_for_step(killed, tmp_path / "killed", 11)
    kill_tree(killed)
    assert torchrun(1, *command("killed", *compiled)).returncode == 0
    assert losses("killed") == losses("whole")
    assert losses("plain") == pytest.approx(losses("whole"), abs=1e-4)
    assert losses("plain") != losses("whole"), "nothing was compiled"


def test_what_cannot_be_compiled_is_refused(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = hourglass("config", tiny_config, "train.compile=true", f"{ZERO}.stage=3")
    assert done.returncode == 2
    assert "train.compile: expected deepspeed.zero_optimization.stage 0, 1 or 2" in done.stderr
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    done = hourglass("train", tiny_config, "train.compile=true", f"run.dir={tmp_path / 'run'}")
    assert done.returncode == 2
    assert "train.compile: needs a C++ compiler on a CPU" in done.stderr
    assert not (tmp_path / "run" / "config.yaml").exists()
