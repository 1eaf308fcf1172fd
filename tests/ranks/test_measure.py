"""The instruments of ``tests/measure``: what ranks hold and send is what the plan says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from paths import CONFIGS, ROOT
from ranks import environment, on_ranks, run_worker

from tests.measure.loop import bench_loop
from tests.measure.store import bench_store
from tests.measure.zero import HELD_WITHIN, SENT_WITHIN, bench_zero, difference

LARGE = CONFIGS / "large_zero3.yaml"
GROUPS_OF_TWO = "zero_hpz_partition_size=2"


@pytest.mark.slow
def test_live_ranks_hold_and_send_what_is_planned() -> None:
    """Two ranks, a small model, steps of one and two micro batches: 3 % of memory, 2 % of
    traffic."""
    for row in bench_zero([2], [1, 2, 3], ["bf16"], [1, 2], layers=10):
        for name in ("weights", "gradients", "master", "moments"):
            assert abs(difference(row, name)) < HELD_WITHIN, (name, row)
        for name in ("sent 1", "sent 2"):
            assert abs(difference(row, name)) < SENT_WITHIN, (name, row)
        # buffers of the size of the model, which is smaller than the bucket asked for
        assert row["measured"]["moment"] < 1.03 * row["planned"]["moment"], row


def counted(ranks: int, cases: list[tuple[int, int]]) -> list[dict[str, float]]:
    overrides = ["model.levels.2.layers=14", f"deepspeed.zero_optimization.{GROUPS_OF_TWO}"]
    run = {"file": str(LARGE), "overrides": overrides, "cases": cases}
    rows: list[dict[str, float]] = on_ranks(ranks, "traffic_worker.py", json.dumps(run))
    return rows


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "cases"), [(2, [(1, 1), (2, 2), (3, 2)]), (4, [(3, 1), (3, 2)])])
def test_live_ranks_send_what_the_plan_says(ranks: int, cases: list[tuple[int, int]]) -> None:
    """Four of them in two groups that keep a copy of the weights each."""
    for row in counted(ranks, cases):
        assert row["sent"] == pytest.approx(row["planned"], rel=0.02), row
        if row["stage"] > 1:
            assert row["calls"] == pytest.approx(row["calls_planned"], rel=0.25), row


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_loop_itself_sends_a_few_numbers(
    ranks: int, tiny_config: Path, dataset: Path, tmp_path: Path
) -> None:
    out = tmp_path / "steps.json"
    changes = [f"data.dataset={dataset}", f"run.dir={tmp_path / 'run'}", "train.steps=9"]
    changes += ["metrics.every=4", "checkpoint.every=100", "eval.every=100"]
    changes += [f"train.micro_batch_size={8 // ranks}"]
    run_worker(ranks, "loop_traffic_worker.py", out, tiny_config, *changes)
    steps = json.loads(out.read_text())
    assert len(steps) == 8  # the last one asks nobody
    plain = {"calls": 1, "sent": 8 * 2 * (ranks - 1) / ranks}  # is the batch there
    assert [steps[at] for at in (1, 2, 4, 5, 6)] == 5 * [plain]
    for recorded in (steps[3], steps[7]):
        assert recorded["calls"] == 2
        assert recorded["sent"] < 2048 * (ranks - 1)


def test_the_store_is_measured() -> None:
    (row,) = bench_store([4], 1)
    assert row["clients"] == 4
    assert all(row[name] > 0 for name in ("connect", "barrier", "posted", "looked", "taken"))


@pytest.mark.slow
def test_the_loop_is_measured_beside_bare_ones(tiny_config: Path, dataset: Path) -> None:
    rows = bench_loop(tiny_config, [f"data.dataset={dataset}"], [1], 3)
    assert [row["name"] for row in rows] == ["1: training", "1: bare engine", "1: plain PyTorch"]
    assert rows[0]["over"] == 1.0
    for row in rows:
        assert row["ms"] * row["flops"] == pytest.approx(rows[0]["ms"] * rows[0]["flops"])


@pytest.mark.slow
def test_saving_is_measured(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.measure.save", "--folder", str(tmp_path)]
    command += ["--millions", "1", "--repeats", "1"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True
    )
    assert "synchronous: training stands still" in done.stdout
    assert not list(tmp_path.iterdir())
