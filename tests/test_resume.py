"""A run killed with SIGKILL and started again has the losses of one that was never disturbed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ranks import kill_tree, start_torchrun, torchrun, wait_for_step

STEPS = 20


def command(config: Path, dataset: Path, run: Path, stage: int) -> list[str]:
    return [
        *("-m", "hourglass_dist.train", str(config), f"data.dataset={dataset}", f"run.dir={run}"),
        f"deepspeed.zero_optimization={{stage: {stage}, {PERSIST if stage == 3 else ''}}}",
    ]


PERSIST = "stage3_param_persistence_threshold: 0"  # or weights this small are not partitioned


def losses(run: Path) -> dict[int, float]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {r["step"]: r["train/loss"] for r in records if "train/loss" in r}


def kill_after(step: int, arguments: list[str], run: Path) -> None:
    """Start two ranks and kill all their processes once ``step`` is done."""
    process = start_torchrun(2, *arguments)
    wait_for_step(process, run, step)
    kill_tree(process)


@pytest.mark.parametrize("stage", [1, 3])
def test_killed_and_continued_equals_undisturbed(
    tiny_config: Path, dataset: Path, tmp_path: Path, stage: int
) -> None:
    """20 steps; and 10 steps, kill -9, the same command again: equal losses, bit for bit."""
    done = torchrun(2, *command(tiny_config, dataset, tmp_path / "whole", stage))
    assert done.returncode == 0, done.stderr[-3000:]
    broken = command(tiny_config, dataset, tmp_path / "broken", stage)
    kill_after(12, broken, tmp_path / "broken")
    assert max(losses(tmp_path / "broken")) < STEPS, "it was killed before its end"
    again = torchrun(2, *broken)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "continuing after step 10" in again.stdout
    expected = losses(tmp_path / "whole")
    assert sorted(expected) == list(range(1, STEPS + 1))
    assert losses(tmp_path / "broken") == expected
    if stage == 1:
        third = torchrun(2, *broken)
        assert third.returncode == 0
        assert "finished: all 20 steps are done" in third.stdout


def test_one_rank_continues_what_two_began(
    tiny_config: Path, dataset: Path, tmp_path: Path
) -> None:
    """Another number of ranks, ZeRO stage and micro batch: the same losses up to rounding."""
    arguments = command(tiny_config, dataset, tmp_path / "run", 2)
    kill_after(12, arguments, tmp_path / "run")
    whole = torchrun(1, *command(tiny_config, dataset, tmp_path / "whole", 2))
    again = torchrun(
        1, *arguments, "deepspeed.zero_optimization.stage=3", "train.micro_batch_size=4"
    )
    assert again.returncode == whole.returncode == 0, again.stderr[-3000:]
    for step, loss in losses(tmp_path / "whole").items():
        assert losses(tmp_path / "run")[step] == pytest.approx(loss, abs=1e-5)
