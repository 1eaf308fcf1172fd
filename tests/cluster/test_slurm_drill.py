"""Real runs under a real Slurm of two nodes, interrupted in every way that Slurm has: each comes to
the weights of an undisturbed run, bit for bit. Prints what a user sees:

    bash launch/test.sh --cluster tests/cluster/test_slurm_drill.py -s
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from ranks import hourglass
from slurm_cluster import SlurmCluster, missing, wait_for
from tiny_run import TINY, losses, state

STEPS = 100  # fifty seconds: Slurm may take half of them to say that a job's time is up
MACHINES = {"nodes": 2, "gpus_per_node": 1, "save_seconds": 120, "join_minutes": 2}
LIMIT = {"time": "30:00"}

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]


class Job:
    """A job in the queue, and the run that it trains."""

    def __init__(self, slurm: SlurmCluster, number: str, run: Path) -> None:
        self.slurm, self.number, self.run = slurm, number, run

    def said(self, start: int = 1) -> str:
        """What the job has said since it was started for the ``start``-th time."""
        path = self.run / f"slurm-{self.number}.out"
        text = path.read_text() if path.exists() else ""
        return text.partition(f"job {self.number}: start {start} ")[2]

    def step(self, start: int = 1) -> int:
        """The last step of the ``start``-th start."""
        return max(map(int, re.findall(r"^step +(\d+)/", self.said(start), re.M)), default=0)

    def wait_for_step(self, step: int, start: int = 1) -> None:
        """Wait until the ``start``-th start has done ``step``."""

        def came() -> bool:
            assert f"start {start + 1} " not in self.said(), self.said()[-3000:]
            return self.step(start) >= step

        wait_for(came, 400, f"step {step} of start {start}")

    def finish(self) -> None:
        """Wait for the end of the job, which is a good one; show what a user sees."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
        found = self.slurm.wait_for_state(self.number, *ended, seconds=600)
        assert (found["JobState"], found["ExitCode"]) == ("COMPLETED", "0:0"), self.said()[-3000:]
        self.show()

    def show(self) -> None:
        """Print what the job has said, without the steps in the middle."""
        lines = self.said().splitlines()
        around = zip(["", *lines], lines, [*lines[1:], ""], strict=False)
        for before, line, after in around:
            if not all(re.match(r"step +\d+", each) for each in (before, line, after)):
                print(line)

    def status(self) -> str:
        """The first line of ``hourglass status``, asked from elsewhere; shows all of it."""
        done = hourglass("status", self.run)
        print(done.stdout)
        assert done.stdout, done.stderr
        return done.stdout.splitlines()[0]

    def tell(self, *command: object) -> str:
        """Run a command of Slurm, which must work; returns what it says."""
        done = self.slurm.run(*command)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


class Yard:
    """A folder with a dataset and settings, on a cluster; not the checkout."""

    def __init__(self, slurm: SlurmCluster, folder: Path, dataset: Path) -> None:
        self.slurm, self.folder = slurm, folder
        settings = yaml.safe_load(TINY)
        settings["data"]["dataset"] = str(dataset)
        settings["train"]["steps"] = STEPS
        settings["checkpoint"]["every"] = 10
        settings["eval"]["every"] = STEPS
        (folder / "tiny.yaml").write_text(yaml.safe_dump(settings))

    def launch(self, name: str, *more: str, **machines: object) -> Job:
        """``hourglass launch slurm``: its job is in the queue."""
        cluster = self.folder / f"{name}.cluster.yaml"
        cluster.write_text(yaml.safe_dump(MACHINES | {"slurm": LIMIT} | machines))
        done = self.slurm.run(
            *(Path(sys.executable).with_name("hourglass"), "launch", "slurm", "tiny.yaml"),
            *(f"run.dir=runs/{name}", *more, "--cluster", cluster),
            cwd=self.folder,
        )
        said = re.fullmatch(r"job (\d+): look at (\S+), or: hourglass status (\S+)\n", done.stdout)
        assert said, done.stderr
        assert said[2] == f"runs/{name}/slurm-{said[1]}.out"
        return Job(self.slurm, said[1], self.folder / said[3])


@pytest.fixture(scope="module")
def yard(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Iterator[Yard]:
    """Two nodes with a slow network between them: a step takes half a second at least."""
    folder = tmp_path_factory.mktemp("slurm")
    with SlurmCluster(folder / "slurm") as slurm:
        slurm.hosts.slow_down("8mbit")
        yield Yard(slurm, folder, dataset)


@pytest.fixture(autouse=True)
def empty(yard: Yard) -> Iterator[None]:
    """Every test has the nodes for itself, after one that failed, too."""
    yield
    yard.slurm.run("scancel", "--user=root")
    wait_for(lambda: yard.slurm.states() == ["idle", "idle"], 100, "idle nodes")


@pytest.fixture(scope="module")
def whole(yard: Yard) -> Path:
    """A run that nobody disturbs."""
    job = yard.launch("whole")
    job.finish()
    assert job.slurm.job(job.number)["Restarts"] == "0"
    return job.run


def require_equal(job: Job, whole: Path) -> None:
    """Weights, moments and losses are those of the undisturbed run."""
    ours, theirs = state(job.run, STEPS), state(whole, STEPS)
    assert not [name for name in theirs if not torch.equal(ours[name], theirs[name])]
    assert losses(job.run) == losses(whole)
    assert not (job.run / "INTERRUPTED").exists()


def report(job: Job, what: str, began: float, start: int) -> int:
    """Wait until it trains again, in its ``start``-th start; print and return the steps lost."""
    wait_for(lambda: job.step(start) > 0, 400, f"training after {what}")
    seconds = time.time() - began
    found = re.search(r"continuing after step (\d+)", job.said(start))
    assert found, job.said(start)
    before = job.said().partition(f": start {start} ")[0]
    steps = [int(step) for step in re.findall(r"^step +(\d+)/", before, re.M)]
    lost = steps[-1] - int(found[1])
    print(f"{what}: training again after {seconds:.0f} s, {lost} steps lost")
    return lost


def test_time_limit_and_requeue(yard: Yard, whole: Path) -> None:
    """Its time is up; then somebody requeues it."""
    job = yard.launch("limit")
    job.wait_for_step(5)
    assert "running" in job.status()
    began = time.time()
    job.tell("scontrol", "update", f"JobId={job.number}", "EndTime=now+120")
    job.slurm.wait_for_state(job.number, "PENDING")
    job.tell("scontrol", "update", f"JobId={job.number}", "TimeLimit=30")
    assert report(job, "time limit", began, 2) == 0
    assert "stopped by SIGUSR1 after step" in job.said()
    began = time.time()
    job.tell("scontrol", "requeue", job.number)
    assert report(job, "scontrol requeue", began, 3) == 0
    assert "stopped by SIGTERM after step" in job.said(2)
    job.finish()
    assert "finished" in job.status()
    require_equal(job, whole)


def test_preemption(yard: Yard, whole: Path) -> None:
    """A job of the higher partition takes its nodes."""
    job = yard.launch("preempted")
    job.wait_for_step(5)
    began = time.time()
    options = ("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null")
    other = job.tell("sbatch", "--parsable", *options, "--wrap", "srun sleep 5")
    assert report(job, "preemption", began, 2) == 0
    assert "stopped by SIGTERM after step" in job.said()
    assert "exit code 75: queued again" in job.said()
    assert job.slurm.job(other)["JobState"] == "COMPLETED"
    job.finish()
    require_equal(job, whole)


@pytest.mark.parametrize("host", [1, 0], ids=["a node", "the node of the script"])
def test_node_failure(yard: Yard, whole: Path, host: int) -> None:
    """A node is gone at once; it comes back."""
    job = yard.launch(f"node{host}")
    job.wait_for_step(15)
    began = time.time()
    job.slurm.kill_node(host)
    job.slurm.wait_for_state(job.number, "PENDING")
    job.slurm.start_node(host)
    assert report(job, f"node {host} lost", began, 2) <= 20
    job.finish()
    require_equal(job, whole)


def test_a_lost_node_is_done_without(yard: Yard, whole: Path) -> None:
    """min_nodes: 1. The other node goes on alone in the same job, with the same batches."""
    job = yard.launch("fewer", min_nodes=1)
    job.wait_for_step(15)
    began = time.time()
    job.slurm.kill_node(1)
    try:
        wait_for(lambda: "continuing after" in job.said(), 300, "training on one node")
        print(f"a node lost, min_nodes 1: continuing after {time.time() - began:.0f} s")
        job.finish()
    finally:
        job.slurm.start_node(1)
    assert job.slurm.job(job.number)["Restarts"] == "0"
    ours, theirs = losses(job.run), losses(whole)
    assert ours == {step: pytest.approx(loss, abs=1e-5) for step, loss in theirs.items()}


def test_a_mistake_is_said_and_not_tried_again(yard: Yard) -> None:
    """Only the job can see it: the dataset is not there."""
    job = yard.launch("mistake", "data.dataset=/nowhere")
    found = job.slurm.wait_for_state(job.number, "FAILED", seconds=200)
    assert (found["ExitCode"], found["Restarts"]) == ("2:0", "0")
    job.show()
    assert [line for line in job.said().splitlines() if "error" in line and "srun" not in line] == [
        "error: /nowhere: expected a dataset folder, found none"
    ]


def test_a_cancelled_job_stays_so_and_the_same_command_continues(yard: Yard, whole: Path) -> None:
    job = yard.launch("cancelled")
    job.wait_for_step(5)
    job.tell("scancel", job.number)
    job.slurm.wait_for_state(job.number, "CANCELLED")
    wait_for(lambda: job.slurm.states() == ["idle", "idle"], 100, "idle nodes")
    job.show()
    assert "stopped by SIGTERM after step" in job.said()
    assert job.slurm.job(job.number)["Restarts"] == "0"
    again = yard.launch("cancelled")
    again.finish()
    assert "continuing after step" in again.said()
    require_equal(again, whole)
