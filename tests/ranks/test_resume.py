"""SIGKILLs at the worst moments: the weights in the end are those of an undisturbed run, bit for
bit, and nothing is left lying about. ``python -m tests.measure.kills`` kills more often.
"""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
from kill_drill import command, differences, drill, often
from paths import HELPERS
from ranks import (
    hourglass,
    kill_tree,
    start_torchrun,
    torchrun,
    wait_for_step,
)
from tiny_run import losses

STEPS = 60  # a save is over in milliseconds: enough of them for a busy machine to meet one


def test_stopped_killed_and_continued(
    tiny_config: Path, dataset: Path, run_folder: Path, tmp_path: Path
) -> None:
    """SIGTERM to torchrun in step 6, SIGKILL to all in step 12: bit for bit the losses, weights
    and moments of a run that nobody disturbed; nearly so on one rank and at another ZeRO stage."""
    run = tmp_path / "run"
    arguments = [str(tiny_config), f"data.dataset={dataset}", f"run.dir={run}"]
    zero = "deepspeed.zero_optimization.stage"
    hold = str(HELPERS / "fault_worker.py"), "hold"

    process = start_torchrun(2, *hold, "6", *arguments, f"{zero}=2")
    wait_for_step(process, run, 5)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 75, said[-3000:]
    assert "stopped by SIGTERM after step 6, which is saved" in said

    process = start_torchrun(2, *hold, "12", *arguments, f"{zero}=2")
    wait_for_step(process, run, 11)
    kill_tree(process)
    alone = shutil.copytree(run, tmp_path / "alone")

    done = torchrun(2, "-m", "hourglass_dist.train", *arguments, f"{zero}=2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert not differences(run, run_folder, 20)

    arguments[-1] = f"run.dir={alone}"
    done = hourglass("train", *arguments, f"{zero}=3", "train.micro_batch_size=4")
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(alone) == pytest.approx(losses(run_folder), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_killed_and_continued_equals_undisturbed(
    tiny_config: Path, dataset: Path, tmp_path: Path, stage: int
) -> None:
    kills = 2 if stage == 1 else 1
    done, wrong = drill(tmp_path, tiny_config, dataset, stage, kills, steps=STEPS, seed=stage)
    assert done.total() == kills
    assert not wrong
    if stage == 1:
        arguments = command(tiny_config, dataset, tmp_path / "broken", stage)
        again = torchrun(2, *arguments, *often(STEPS))
        assert f"finished: all {STEPS} steps are done" in again.stdout


@pytest.mark.slow
def test_one_rank_continues_what_two_began(
    tiny_config: Path, dataset: Path, tmp_path: Path
) -> None:
    """Another number of ranks, ZeRO stage and micro batch: the same losses up to rounding."""
    arguments = command(tiny_config, dataset, tmp_path / "run", 2)
    process = start_torchrun(2, *arguments)
    wait_for_step(process, tmp_path / "run", 12)
    kill_tree(process)
    whole = torchrun(1, *command(tiny_config, dataset, tmp_path / "whole", 2))
    again = torchrun(
        1, *arguments, "deepspeed.zero_optimization.stage=3", "train.micro_batch_size=4"
    )
    assert again.returncode == whole.returncode == 0, again.stderr[-3000:]
    for step, loss in losses(tmp_path / "whole").items():
        assert losses(tmp_path / "run")[step] == pytest.approx(loss, abs=1e-5)
