"""What is found before a run starts: every fault is named, with the ranks that have it."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from paths import ROOT
from rank_hosts import own_namespace, run_nodes, slowed
from ranks import (
    environment,
    hourglass,
    kill_tree,
    start_torchrun,
    torchrun,
    torchrun_command,
)

PREFLIGHT = ("-m", "hourglass_dist.preflight")
TRAIN = ("-m", "hourglass_dist.train")


@pytest.fixture
def arguments(tiny_config: Path, dataset: Path, tmp_path: Path) -> list[str]:
    return [str(tiny_config), f"data.dataset={dataset}", f"run.dir={tmp_path / 'runs' / 'mine'}"]


def errors(text: str) -> list[str]:
    """What the user sees of mistakes, and nothing else."""
    lines = text.splitlines()
    assert all(line.startswith("error: ") for line in lines), text
    return [line.removeprefix("error: ") for line in lines]


def test_it_says_what_there_is_and_leaves_nothing(arguments: list[str], tmp_path: Path) -> None:
    done = torchrun(2, *PREFLIGHT, *arguments)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("preflight: 1 node ("), done.stderr
    assert ", 2 ranks, " in lines[0]
    names = [line.split("  ")[1] for line in lines[1:-1]]
    assert names == ["code", "settings", "devices", "run folder", "data", "clocks", "products",
                     "all-reduce"]  # fmt: skip
    # another program may take a core of a busy machine from one of the two
    others = [line for line in errors(done.stderr) if " is slow: " not in line]
    assert not others
    assert done.returncode == (2 if done.stderr else 0)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_other_settings_or_code_are_refused_on_all_ranks(
    arguments: list[str], tmp_path: Path
) -> None:
    """Also by the training itself, before it writes anything."""
    copy = tmp_path / "copy"
    shutil.copytree(ROOT / "hourglass_dist", copy / "hourglass_dist")
    shutil.copytree(ROOT / "data_tools", copy / "data_tools")
    with (copy / "hourglass_dist" / "optim.py").open("a") as file:
        file.write("# another\n")
    for program in (PREFLIGHT, TRAIN):
        own = {0: ["train.steps=20"], 1: ["train.steps=30"]}
        found = run_nodes([*program, *arguments], own, scripts={1: f"cd {copy}"})
        assert [done.returncode for done in found] == [2, 2], found
        code, setting = errors(found[0].stderr)
        assert code.startswith("ranks disagree: hourglass_dist/*.py: ")
        assert " on rank 0 (node0), " in code
        assert code.endswith(" on rank 1 (node1)")
        assert setting == (
            "ranks disagree: the settings of rank 1 (node1) are not those of rank 0 (node0): "
            "train.steps: 20 -> 30"
        )
        assert found[1].stderr == ""
        assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_folders_that_are_not_the_same_are_named(
    arguments: list[str], dataset: Path, tmp_path: Path
) -> None:
    """One host has its own run folder, and another dataset under the same name."""
    runs, other = tmp_path / "runs", tmp_path / "other"
    runs.mkdir()
    (tmp_path / "other.txt").write_text("another text\n" * 1000)
    words = ("data", "shard", tmp_path / "other.txt", "--out", other, "--held-out", "last:0.2")
    made = hourglass(*words, "--block-tokens", 1024)
    assert made.returncode == 0, made.stderr
    script = f"mount -t tmpfs none {runs}\nmount --bind {other} {dataset}"
    found = run_nodes([*PREFLIGHT, *arguments], scripts={1: script})
    assert [done.returncode for done in found] == [2, 2], found
    shared, data, *_ = errors(found[0].stderr)
    assert shared == (
        f"{runs}/mine: is not shared: rank 1 (node1) cannot see what rank 0 (node0) writes there; "
        "run.dir must be on a file system that all nodes mount at the same place"
    )
    assert data.startswith(f"ranks disagree: the manifest of {dataset}: ")
    assert " on rank 0 (node0), " in data
    assert data.endswith(" on rank 1 (node1)")
    assert not list(runs.iterdir())

    found = run_nodes([*TRAIN, *arguments], scripts={1: f"mount -t tmpfs none {runs}"})
    assert [done.returncode for done in found] == [2, 2], found
    assert errors(found[0].stderr) == [shared]


@pytest.mark.slow
def test_a_full_disk_is_named(arguments: list[str], tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    for size, program, count in ((1536, PREFLIGHT, "3 checkpoints"), (256, TRAIN, "1 checkpoint")):
        done = subprocess.run(
            own_namespace(
                f"mount -t tmpfs -o size={size}k none {runs}",
                *torchrun_command(2, *program, *arguments),
            ),
            capture_output=True,
            text=True,
            env=environment(),
            timeout=240,
            check=False,
        )
        assert done.returncode == 2, done.stderr
        [full] = [line for line in errors(done.stderr) if " is slow: " not in line]
        assert full.startswith(f"{runs}/mine: the disk is full: ")
        assert full.endswith(f" needed for {count}")


@pytest.mark.slow
def test_a_slow_rank_and_a_wrong_clock_are_named(arguments: list[str], tmp_path: Path) -> None:
    script = (
        "import os, pathlib, sys, time\n"
        "from hourglass_dist import preflight\n"
        "rank, now = os.environ['RANK'], time.time\n"
        "time.time = lambda: now() + 5 * int(rank)\n"
        "pathlib.Path(sys.argv[1], rank).write_text(str(os.getpid()))\n"
        "sys.exit(preflight.main(sys.argv[2:]))\n"
    )
    worker = tmp_path / "worker.py"
    worker.write_text(script)
    pids = tmp_path / "pids"
    pids.mkdir()
    process = start_torchrun(2, str(worker), str(pids), *arguments)
    try:
        deadline = time.monotonic() + 120
        while not ((pids / "1").exists() and (pids / "1").read_text()):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        with slowed(psutil.Process(int((pids / "1").read_text()))):
            _, said = process.communicate(timeout=240)
    finally:
        if process.poll() is None:
            kill_tree(process)
    assert process.returncode == 2, said
    clock, slow = errors(said)
    assert clock.startswith("clocks differ by ")
    assert " s: rank 1 (" in clock
    assert slow.startswith("rank 1 (")
    assert ") is slow: " in slow
    assert " GFLOP/s in a matrix product, the best of 5, where the median of all ranks is " in slow
