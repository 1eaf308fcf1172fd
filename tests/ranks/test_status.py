"""``hourglass status``: of runs that go on, were stopped, were killed, hang, are finished."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from rank_hosts import slowed
from ranks import environment, hourglass, kill_tree, torchrun_command, wait_for_step

from hourglass_dist.core.records import require_progress
from hourglass_dist.health.heartbeat import read_heartbeats
from hourglass_dist.health.stragglers import IN_A_ROW, Stragglers, spread
from hourglass_dist.report.status import read_status, render


def status(run: Path, code: int) -> dict[str, Any]:
    """What the command says, as a program sees it; people see at most 100 columns."""
    done = hourglass("status", run)
    assert done.returncode == code, done.stdout + done.stderr
    assert all(len(line) <= 100 for line in done.stdout.splitlines())
    found: dict[str, Any] = json.loads(hourglass("status", run, "--json").stdout)
    assert f"  {found['state']}" in done.stdout.splitlines()[0]
    return found


def start(config: Path, dataset: Path, run: Path, log: Path) -> subprocess.Popen[str]:
    """Two ranks that would train for long."""
    arguments = [str(config), f"data.dataset={dataset}", f"run.dir={run}", "train.steps=1000000"]
    arguments += ["eval.every=1000000", "checkpoint.every=1000000", "metrics.every=10"]
    with log.open("a") as output:
        return subprocess.Popen(
            torchrun_command(2, "-m", "hourglass_dist.train", *arguments),
            stdout=output,
            stderr=output,
            text=True,
            env=environment(),
        )


def test_a_finished_run(run_folder: Path) -> None:
    found = status(run_folder, 0)
    assert (found["state"], found["step"], found["steps"]) == ("finished", 20, 20)
    assert (found["checkpoint_step"], found["starts"], found["ranks"]) == (20, 1, 2)
    assert found["last_ending"] == "finished"
    assert found["loss"] > 0
    assert found["tokens_per_second"] > 0
    assert found["heldout_bits_per_byte"] > 0
    assert not found["silent"]
    assert not (run_folder / "heartbeats").exists()


def test_it_needs_no_torch() -> None:
    """It is asked on login nodes, again and again."""
    script = "import sys, hourglass_dist.report.status; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_no_run(tmp_path: Path) -> None:
    done = hourglass("status", tmp_path)
    assert done.returncode == 2
    line = f"error: {tmp_path}: expected a run folder (with config.yaml), found none"
    assert done.stderr.splitlines() == [line]


@pytest.mark.slow
def test_a_run_while_it_goes_on_and_after(tiny_config: Path, dataset: Path, tmp_path: Path) -> None:
    """Running, with a rank that is slow, then stopped by a signal; asked to stop; killed."""
    run, log = tmp_path / "run", tmp_path / "log"
    process = start(tiny_config, dataset, run, log)
    try:
        wait_for_step(process, run, 10)
        found = status(run, 0)
        assert found["state"] == "running"
        assert found["why"] == "training"
        assert found["step"] >= 10
        assert len(found["hosts"]) == 1
        assert found["checkpoint_step"] is None
        assert found["seconds_left"] > 0
        beats = {beat.rank: beat for beat in read_heartbeats(run)}
        assert beats[0].loss is not None
        assert beats[1].loss is None
        second = psutil.Process(beats[1].pid)
        with slowed(second):
            until(lambda: f"rank 1 ({beats[1].host}) is slow: " in log.read_text())
            until(lambda: f"rank 1 ({beats[1].host}), " in str(read_status(run).straggler))
        second.suspend()
        assert status(run, 0)["silent"] == [f"rank 1 ({beats[1].host}): stopped by a signal"]
        second.resume()
        (run / "STOP").touch()
        assert process.wait(timeout=120) == 75
    finally:
        if process.poll() is None:
            kill_tree(process)
    found = status(run, 75)
    assert found["state"] == "stopped"
    assert found["why"].startswith("stopped by the file STOP after step ")
    assert found["checkpoint_step"] == found["step"]

    process = start(tiny_config, dataset, run, log)
    try:
        until(
            lambda: len(read_heartbeats(run)) == 2 and read_heartbeats(run)[0].doing == "training"
        )
    finally:
        kill_tree(process)
    found = status(run, 1)
    assert (found["state"], found["why"], found["starts"]) == (
        "crashed",
        "its processes are gone",
        2,
    )
    assert len(found["silent"]) == 2
    hangs(run)


def hangs(run: Path) -> None:
    """Ranks on hosts elsewhere, whose processes cannot be looked at: their last words decide."""
    for age, state in ((1, "running"), (650, "hanging"), (9000, "crashed")):
        for beat in read_heartbeats(run):
            path = run / "heartbeats" / f"rank_{beat.rank:05d}.json"
            other = {"host": f"node{beat.rank}", "time": time.time() - age * (1 + beat.rank)}
            path.write_text(json.dumps(json.loads(path.read_text()) | other))
        found = read_status(run)
        assert found.state == state
        assert bool(found.silent) == (age > 1)
        assert ("rank 1 (node1)" in found.why) == (state == "hanging")


def until(true: Any) -> None:
    """Wait, not for ever."""
    deadline = time.monotonic() + 240
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_broken_file_of_a_rank_is_left_out(run_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "heartbeats").mkdir(parents=True)
    for name in ("config.yaml", "metrics.jsonl", "history.jsonl"):
        shutil.copy(run_folder / name, run)
    (run / "heartbeats" / "rank_00000.json").write_text('{"time": 1')
    assert read_status(run).state == "finished"
    (run / "history.jsonl").unlink()
    assert read_status(run).state == "crashed"


def test_everything_fits_a_line_of_100_columns(run_folder: Path) -> None:
    found = replace(
        read_status(run_folder),
        state="hanging",
        why="silent for longer than 20:00: " + ", ".join(f"rank {n} (node{n})" for n in range(9)),
        hosts=[f"a-long-name-of-a-node-{n}" for n in range(512)],
        silent=[f"rank {n} (a-long-name-of-a-node-{n}): gone" for n in range(600)],
        last_ending="RuntimeError: " + "something [that] is long " * 20,
        straggler="rank 7 (node1), 1.9 times as long as the others",
    )
    lines = render(found).splitlines()
    assert max(map(len, lines)) <= 100
    assert "[that]" in render(found)
    assert any("and 592 more" in line for line in lines)


def test_a_straggler_is_told_of_once() -> None:
    """After some records in a row, and again when it has been well in between."""
    stragglers = Stragglers(["node0", "node0", "node1", "node1"])

    def look(step: int, slow: bool) -> str | None:
        return stragglers.check(step, spread([1.0, 1.1, 0.9, 2.5 if slow else 1.2]))

    for begin in (0, 100):
        told = [look(begin + step, slow=True) for step in range(3 * IN_A_ROW)]
        assert [step for step, line in enumerate(told) if line] == [IN_A_ROW - 1]
        assert told[IN_A_ROW - 1] == (
            f"step {begin + IN_A_ROW - 1}: rank 3 (node1) is slow: it needs 2.5 times as long as "
            "the others for itself, and all wait for it"
        )
        assert look(begin + 50, slow=False) is None
    assert spread([1.0]) == {}


def test_which_starts_were_fruitless(tmp_path: Path) -> None:
    """Crashes in a row from the same step; not what was asked to stop, nor mistakes."""
    crash = {"event": "end", "reason": "RuntimeError: lost", "crashed": True}
    stop = {"event": "end", "reason": "stopped by SIGTERM after step 9, which is saved"}

    def history(*events: tuple[int, dict[str, Any] | None]) -> None:
        lines = []
        for step, end in events:
            lines.append({"event": "start", "time": 0, "step": step, "ranks": 2})
            lines += [end | {"time": 1, "step": step + 3}] if end else []
        (tmp_path / "history.jsonl").write_text("".join(json.dumps(e) + "\n" for e in lines))

    history((0, crash), (0, None), (9, crash), (9, stop), (9, None))
    require_progress(tmp_path, 9, most=3)
    require_progress(tmp_path, 12, most=1)
    with pytest.raises(ValueError, match=r"the last 2 starts all crashed before .* beyond step 9 "):
        require_progress(tmp_path, 9, most=2)
    history((0, None), (0, None))
    with pytest.raises(ValueError, match=r"the last one: killed, no end noted.*_starts=4$"):
        require_progress(tmp_path, 0, most=2)
    (tmp_path / "history.jsonl").unlink()
    require_progress(tmp_path, 0, most=1)
