"""A gradient that is no number changes nothing, is noted, and ends the run when it stays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ranks import TESTS, torchrun
from test_resume import PERSIST, losses


def settings(config: Path, dataset: Path, run: Path, stage: int) -> list[str]:
    zero = f"{{stage: {stage}, {PERSIST if stage == 3 else ''}}}"
    return [
        *(str(config), f"data.dataset={dataset}", f"run.dir={run}", "train.steps=8"),
        *(f"deepspeed.zero_optimization={zero}", "eval.every=8", "optim.clip_grad_norm=0"),
    ]


def test_a_step_without_a_gradient_changes_nothing(
    tiny_config: Path, dataset: Path, tmp_path: Path
) -> None:
    """On one rank's fault, at every stage, with the same losses before and after."""
    found = []
    for stage in (0, 1, 2, 3):
        run = tmp_path / str(stage)
        arguments = settings(tiny_config, dataset, run, stage)
        done = torchrun(2, str(TESTS / "nan_worker.py"), "3,6", *arguments)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "step 3: loss nan, gradient norm nan: skipped; rows 16 to 23" in done.stdout
        noted = [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]
        assert [(entry["step"], entry["rows"]) for entry in noted] == [(3, [16, 24]), (6, [40, 48])]
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert max(record.get("train/skipped_steps", 0) for record in records) == 2
        found.append(losses(run))
    assert sorted(found[0]) == [1, 2, 4, 5, 7, 8]
    for other in found[1:]:
        assert other == pytest.approx(found[0], abs=1e-5)


def test_too_many_in_a_row_end_the_run(tiny_config: Path, dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = [*settings(tiny_config, dataset, run, 1), "train.max_skipped_steps=3"]
    done = torchrun(2, str(TESTS / "nan_worker.py"), "4,5,6,7", *arguments)
    assert done.returncode == 1
    assert "stopped: step 6: loss nan, gradient norm nan: 3 steps in a row" in done.stderr
