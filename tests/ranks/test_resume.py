"""SIGKILLs at the worst moments: the weights in the end are those of an undisturbed run, bit for
bit, and nothing is left lying about. ``python -m tests.measure.kills`` kills more often.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from kill_drill import command, drill, often
from ranks import (
    kill_tree,
    start_torchrun,
    torchrun,
    wait_for_step,
)
from tiny_run import losses

STEPS = 60  # a save is over in milliseconds: enough of them for a busy machine to meet one


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
