"""Steps that go wrong: NaN, a loss that jumps, a rank that hangs, too little memory."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from paths import HELPERS, ROOT
from ranks import (
    environment,
    kill_tree,
    torchrun,
    torchrun_command,
    wait_for_step,
)
from safetensors.torch import load_file
from tiny_run import PERSIST, losses

from hourglass_dist.checkpoint.save import read_manifest
from hourglass_dist.config.schema import SpikeConfig
from hourglass_dist.training.guards import LossSpikes, SpikeFound


def settings(config: Path, dataset: Path, run: Path, stage: int, steps: int = 8) -> list[str]:
    zero = f"{{stage: {stage}, {PERSIST if stage == 3 else ''}}}"
    return [
        *(str(config), f"data.dataset={dataset}", f"run.dir={run}", f"train.steps={steps}"),
        *(f"deepspeed.zero_optimization={zero}", "eval.every=8", "optim.clip_grad_norm=0"),
    ]


@pytest.mark.parametrize("stages", [(3,), pytest.param((0, 1, 2, 3), marks=pytest.mark.slow)])
def test_a_step_without_a_gradient_changes_nothing(
    tiny_config: Path, dataset: Path, tmp_path: Path, stages: tuple[int, ...]
) -> None:
    """On one rank's fault, at every stage, with the same losses before and after."""
    found = []
    for stage in stages:
        run = tmp_path / str(stage)
        arguments = settings(tiny_config, dataset, run, stage)
        done = torchrun(2, str(HELPERS / "fault_worker.py"), "nan", "3,6", *arguments)
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


@pytest.mark.slow
def test_too_many_in_a_row_end_the_run(tiny_config: Path, dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = [*settings(tiny_config, dataset, run, 1), "train.max_skipped_steps=3"]
    done = torchrun(2, str(HELPERS / "fault_worker.py"), "nan", "4,5,6,7", *arguments)
    assert done.returncode == 1
    assert "stopped: step 6: loss nan, gradient norm nan: 3 steps in a row" in done.stderr


@pytest.mark.slow
def test_a_spike_is_left_out(tiny_config: Path, dataset: Path, tmp_path: Path) -> None:
    """A batch that wrecks the weights: the run goes back, leaves it out, and ends as low as
    it would have without it."""
    found = []
    for name, bad in (("run", "18"), ("without", "0")):
        arguments = settings(tiny_config, dataset, tmp_path / name, 1, steps=40)
        arguments += ["train.spikes={window: 8}", "checkpoint.keep=9"]
        done = torchrun(2, str(HELPERS / "fault_worker.py"), "lr", bad, *arguments)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append((done.stdout, losses(tmp_path / name)))
    said, disturbed = found[0]
    [line] = [line for line in said.splitlines() if "the loss has jumped" in line]
    assert line.startswith("step 21: the loss has jumped to ")
    assert line.endswith(": back after step 15, the data of 6 steps is left out")
    assert disturbed[40] == pytest.approx(found[1][1][40], abs=0.2)
    assert max(disturbed.values()) < 6, "what was given up is forgotten"
    progress = read_manifest(tmp_path / "run" / "checkpoints" / "step_00000040")["progress"]
    assert progress["guard"]["left_out"] == [[15, 6]]
    assert progress["data"]["next_row"] == 46 * 8


def test_the_state_of_spikes_goes_on_as_it_was() -> None:
    """Cut anywhere, carried through JSON: the same decisions."""
    config = SpikeConfig(window=8, most=2)
    losses = [3.0 - 0.01 * n for n in range(30)] + [9.0] * 2 + [2.7] * 5 + [9.0] * 3

    def decisions(cut: int) -> tuple[list[int], dict[str, object]]:
        spikes, found = LossSpikes(config, {}), []
        for step, loss in enumerate(losses, start=1):
            try:
                spikes.check(step, loss)
            except SpikeFound as spike:
                found.append(spike.data_step)
            if step == cut:
                spikes = LossSpikes(config, json.loads(json.dumps(spikes.state())))
        return found, spikes.state()

    expected = decisions(0)
    assert expected[0] == [len(losses)], "two high losses are none, three are one"
    for cut in range(1, len(losses)):
        assert decisions(cut) == expected


def test_what_is_left_out_adds_up() -> None:
    spikes = LossSpikes(SpikeConfig(window=8), {})
    once = spikes.back_at(20, {}, 27)
    assert (once.data_step(19), once.data_step(20), once.data_step(30)) == (19, 27, 37)
    twice = once.back_at(20, {}, 31)
    assert twice.data_step(20) == 31
    later = twice.back_at(40, {}, 60)
    assert (later.data_step(20), later.data_step(40)) == (31, 60)
    assert len(later.left_out) == 3


def ranks_of(torchrun: psutil.Process, number: int) -> list[psutil.Process]:
    """Its ranks, in order, once they are all there."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(psutil.Error):
            by_rank = {p.environ().get("RANK"): p for p in torchrun.children()}
            if len(by_rank) == number and None not in by_rank:
                return [by_rank[str(rank)] for rank in range(number)]
        time.sleep(0.02)
    raise AssertionError("the ranks did not start")


@pytest.mark.slow
def test_a_stopped_rank_leaves_all_stacks_and_is_started_again(
    tiny_config: Path, dataset: Path, tmp_path: Path
) -> None:
    """SIGSTOP to one rank: both stacks in the run folder, both ranks ended, and, started again by
    torchrun, the weights of an undisturbed run."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    arguments = settings(tiny_config, dataset, whole, 1, steps=30)
    assert torchrun(2, "-m", "hourglass_dist.train", *arguments).returncode == 0
    arguments = settings(tiny_config, dataset, run, 1, steps=30)
    process = subprocess.Popen(
        ["bash", ROOT / "launch/torchrun.sh", *arguments, "run.hang_minutes=0.1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment() | {"MAX_RESTARTS": "1", "VIRTUAL_ENV": sys.prefix},
    )
    try:
        wait_for_step(process, run, 7)
        ranks = ranks_of(psutil.Process(process.pid), 2)
        ranks[1].suspend()
        _, said = process.communicate(timeout=200)
    finally:
        if process.poll() is None:
            kill_tree(process)
    assert process.returncode == 0, said[-3000:]
    assert "no sign of life for 6 s, after step " in said
    for rank, pid in enumerate(r.pid for r in ranks):
        [stacks] = (run / "stacks").glob(f"rank_{rank:05d}_*.txt")
        text = stacks.read_text()
        assert f"process {pid}{', which is stopped' * rank}, after step " in text
        assert "run_steps (" in text
    assert losses(run) == losses(whole)
    name = "checkpoints/step_00000030/rank_00000.safetensors"  # its header has no order
    mine, undisturbed = load_file(run / name), load_file(whole / name)
    assert mine.keys() == undisturbed.keys()
    assert all(torch.equal(mine[key], undisturbed[key]) for key in mine)
    assert not (run / "heartbeats").exists()


@pytest.mark.slow
def test_where_stacks_cannot_be_read_a_rank_writes_its_own(
    tiny_config: Path, dataset: Path, tmp_path: Path
) -> None:
    """py-spy is not there: the watcher asks a stopped rank itself, which wakes up and continues."""
    run, bare = tmp_path / "run", tmp_path / "bare"
    bare.mkdir()
    (bare / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (bare / "python").chmod(0o755)
    script = (
        "import runpy, sys\n"
        f"sys.executable = '{bare / 'python'}'\n"
        "sys.argv = sys.argv[2:]\n"
        "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)\n"
    )
    arguments = settings(tiny_config, dataset, run, 1, steps=10**6)
    command = torchrun_command(2, "-m", "hourglass_dist.train", *arguments, "run.hang_minutes=0.2")
    process = subprocess.Popen(
        [sys.executable, "-c", script, *command[1:]],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment() | {"PATH": f"{bare}:/usr/bin:/bin"},
    )
    try:
        wait_for_step(process, run, 7)
        second = ranks_of(psutil.Process(process.pid), 2)[1]
        second.suspend()
        stacks = run / "stacks" / "rank_00001.txt"
        deadline = time.monotonic() + 120
        while "run_steps" not in stacks.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert f"process {second.pid}, which is stopped, after step " in stacks.read_text()
        (run / "STOP").touch()
        _, said = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            kill_tree(process)
    assert process.returncode == 75, said[-3000:]
    assert "no sign of life for 12 s" in said


@pytest.mark.slow
def test_a_run_that_crashes_again_and_again_is_refused(
    tiny_config: Path, dataset: Path, tmp_path: Path
) -> None:
    """Before anything is saved; until the user says to try again."""
    run = tmp_path / "run"
    arguments = [*settings(tiny_config, dataset, run, 1), "train.max_skipped_steps=2"]
    crash = [str(HELPERS / "fault_worker.py"), "nan", "2,3", *arguments]
    for _ in range(2):
        done = torchrun(2, *crash, "run.max_fruitless_starts=2")
        assert done.returncode == 1, done.stderr[-3000:]
    done = torchrun(2, *crash, "run.max_fruitless_starts=2")
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith(
        f"error: {run}: the last 2 starts all crashed before anything beyond step 0 was saved (the "
        "last one: FloatingPointError: step 3: loss nan, gradient norm nan: 2 steps in a row"
    )
    again = "run.max_fruitless_starts=4"
    assert line.endswith(f"to try again all the same: {again}")
    done = torchrun(2, "-m", "hourglass_dist.train", *arguments, again)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_full_disk_costs_records_and_checkpoints_but_not_the_run(
    tiny_config: Path, dataset: Path, tmp_path: Path
) -> None:
    """Files may not grow past a few kilobytes after the start: saves and records fail, loudly, and
    steps go on to the last one, whose save is needed."""
    script = (
        "import resource, signal, sys\n"
        "from hourglass_dist import train\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "steps = train.run_steps\n"
        "def full(job):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))\n"
        "    steps(job)\n"
        "train.run_steps = full\n"
        "sys.exit(train.main(sys.argv[1:]))"
    )
    arguments = settings(tiny_config, dataset, tmp_path / "run", 1, steps=20)
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=200,
        check=False,
    )
    assert done.returncode == 2, done.stderr[-3000:]
    assert "step 5: could not be saved: rank 0: " in done.stdout
    assert done.stdout.count("are lost, training continues: ") == 1
    assert "step 20/20" in done.stdout
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "rank_00000.safetensors: cannot be written" in line


@pytest.mark.slow
def test_too_little_memory_is_said_before_the_first_step(
    tiny_config: Path, dataset: Path, tmp_path: Path
) -> None:
    """A process that may not have more memory, and rows that want it."""
    script = (
        "import resource, sys\n"
        "from hourglass_dist import train\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 3 * 2**30,) * 2)\n"
        "sys.exit(train.main(sys.argv[1:]))"
    )
    arguments = settings(tiny_config, dataset, tmp_path / "run", 1)
    large = ["train.micro_batch_size=20000", "data.batch_size=20000"]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments, *large],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=200,
        check=False,
    )
    assert done.returncode == 2, done.stderr[-3000:]
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith(
        "error: out of memory in a step of 20000 x 64 tokens on a rank; the plan"
    )
    assert "train.micro_batch_size=10000 (the same batch" in line
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
