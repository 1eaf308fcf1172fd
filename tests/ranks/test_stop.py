"""A run that is asked to stop saves, says so with exit code 75, and goes on as if nothing were."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from ranks import kill_tree, start_torchrun, torchrun, wait_for_step
from tiny_run import losses

from hourglass_dist.core.records import read_history

STEPS = 60


def last_step(run: Path) -> int:
    log = run / "metrics.jsonl"
    text = log.read_text() if log.exists() else ""
    return max(map(int, re.findall(r'"step": (\d+),', text)), default=0)


def stop_with(
    ask: Callable[[psutil.Process], object], command: list[str], run: Path, code: int = 75
) -> str:
    """Start two ranks, ask once some more steps are done; what they said at their end."""
    before = last_step(run)
    process = start_torchrun(2, *command)
    try:
        wait_for_step(process, run, before + 3)
        ask(psutil.Process(process.pid))
        _, said = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            kill_tree(process)
    assert process.returncode == code, said[-3000:]
    assert last_step(run) < STEPS
    return said


def second_rank(agent: psutil.Process) -> psutil.Process:
    return next(p for p in agent.children() if p.environ().get("RANK") == "1")


@pytest.mark.slow
def test_asked_to_stop_in_every_way(tiny_config: Path, dataset: Path, tmp_path: Path) -> None:
    """By a file, the clock, a signal to one rank, a signal to torchrun; one after the other."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    common = ["-m", "hourglass_dist.train", str(tiny_config), f"data.dataset={dataset}"]
    common += [f"train.steps={STEPS}", "checkpoint.every=50", "eval.every=60"]
    command = [*common, f"run.dir={run}"]
    assert torchrun(2, *common, f"run.dir={whole}").returncode == 0

    run.mkdir()
    (run / "STOP").touch()
    done = torchrun(2, *command)
    assert done.returncode == 75, done.stderr[-3000:]
    line = "stopped by the file STOP after step 1, which is saved"
    assert done.stderr.splitlines()[-1] == f"{line}; the same command continues"
    assert (run / "INTERRUPTED").read_text() == f"{line}\n"
    assert not (run / "STOP").exists()

    done = torchrun(2, *command, "run.time_limit_hours=1e-6")
    assert done.returncode == 75, done.stderr[-3000:]
    assert "stopped by run.time_limit_hours after step 2" in done.stderr

    said = stop_with(lambda agent: second_rank(agent).send_signal(signal.SIGUSR1), command, run)
    assert "stopped by SIGUSR1 after step " in said
    said = stop_with(lambda agent: agent.send_signal(signal.SIGTERM), command, run)
    assert "stopped by SIGTERM after step " in said

    done = torchrun(2, *command)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (run / "INTERRUPTED").exists()
    assert losses(run) == losses(whole)
    assert len(losses(whole)) == STEPS
    entries = read_history(run)
    assert [entry["event"] for entry in entries] == ["start", "end"] * 5
    assert entries[1]["reason"] == "stopped by the file STOP after step 1, which is saved"
    assert entries[-1]["reason"] == "finished"
    assert [end["step"] for end in entries[1:-1:2]] == [start["step"] for start in entries[2::2]]


def test_ctrl_c_saves_nothing_and_says_so(tiny_config: Path, dataset: Path, tmp_path: Path) -> None:
    command = ["-m", "hourglass_dist.train", str(tiny_config), f"data.dataset={dataset}"]
    command += [f"train.steps={STEPS}", f"run.dir={tmp_path}"]
    said = stop_with(lambda agent: agent.send_signal(signal.SIGINT), command, tmp_path, code=130)
    words = "stopped by Ctrl-C, unsaved: the same command continues from the newest save"
    assert said.splitlines() == [words]
