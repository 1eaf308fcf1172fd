"""launch/slurm.sbatch under a real Slurm: what follows from each exit code. Instead of training,
every node ends with the codes that a test gives; real runs are in test_slurm_drill.py."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import ROOT
from slurm_cluster import SlurmCluster, missing, wait_for

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

# Takes a word for every start: CODE, or 0,2 for the nodes' own; s60: 0 after a minute; s60:2.
PROGRAM = """
given=("$@")
IFS=, read -ra codes <<<"${given[${SLURM_RESTART_COUNT:-0}]}"
code=${codes[$SLURM_NODEID]:-${codes[0]}}
echo "$SLURM_NODEID: $NNODES nodes $MASTER_ADDR:$MASTER_PORT $JOB_ID $SHUTDOWN_TIMEOUT: $code"
if [[ $code == s* ]]; then
  IFS=: read -r seconds code <<<"${code#s}"
  sleep "$seconds"
fi
exit "${code:-0}"
"""


class Desk:
    """Where jobs are handed in."""

    def __init__(self, slurm: SlurmCluster, folder: Path) -> None:
        self.slurm, self.folder = slurm, folder
        self.launch = folder / "checkout/launch"
        self.launch.mkdir(parents=True)
        shutil.copy(ROOT / "launch/slurm.sbatch", self.launch)
        (self.launch / "torchrun.sh").write_text(PROGRAM)

    def submit(self, *words: str, options: str = "--nodes=1", **environment: str) -> str:
        """Hand in a job from a folder that is not the checkout; returns its number."""
        done = self.slurm.run(
            *("env", *(f"{name}={value}" for name, value in environment.items())),
            *("sbatch", "--parsable", *options.split(), "--output=%j.out"),
            *("checkout/launch/slurm.sbatch", *words),
            cwd=self.folder,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def said(self, number: str) -> str:
        """What a job has said."""
        path = self.folder / f"{number}.out"
        return path.read_text() if path.exists() else ""

    def end(self, number: str) -> tuple[str, str, int]:
        """State, exit code and number of restarts of a job that has come to its end."""
        states = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
        found = self.slurm.wait_for_state(number, *states, seconds=120)
        print(self.said(number))
        return found["JobState"], found["ExitCode"], int(found["Restarts"])


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    folder = tmp_path_factory.mktemp("slurm")
    with SlurmCluster(folder / "slurm", name="sq", subnet="10.92.1") as slurm:
        yield Desk(slurm, folder)


def test_exit_codes_are_honoured(desk: Desk) -> None:
    """0 and 2 end it, 75 and crashes start it again."""
    expected = {
        "0": ("COMPLETED", "0:0", 0),
        "2": ("FAILED", "2:0", 0),
        "75 0": ("COMPLETED", "0:0", 1),
        "1 2": ("FAILED", "2:0", 1),
        "137 75 0": ("COMPLETED", "0:0", 2),
    }
    jobs = {codes: desk.submit(*codes.split()) for codes in expected}
    assert {codes: desk.end(number) for codes, number in jobs.items()} == expected
    number = jobs["75 0"]
    said = desk.said(number)
    assert f"job {number}: exit code 75: queued again" in said
    port = 20000 + int(number)
    for start in (0, 1):
        assert f":{port} {number}.{start} 300: " in said
    assert "error" not in desk.said(jobs["0"])


def test_every_node_counts(desk: Desk) -> None:
    """Two nodes: a mistake on one; one that crashes while the other hangs."""
    mistake = desk.submit("2,0", options="--nodes=2")
    assert desk.end(mistake) == ("FAILED", "2:0", 0)
    assert "1: 2 nodes sq0:" in desk.said(mistake)
    hangs = desk.submit("1,s600", "0,0", options="--nodes=2", SHUTDOWN_TIMEOUT="2")
    assert desk.end(hangs) == ("COMPLETED", "0:0", 1)


def test_crashes_without_end_are_ended(desk: Desk) -> None:
    script = desk.launch / "slurm.sbatch"
    text = script.read_text()
    assert "most_starts=100" in text
    script.write_text(text.replace("most_starts=100", "most_starts=1"))
    number = desk.submit("1", "1", "0")
    script.write_text(text)
    assert desk.end(number) == ("FAILED", "1:0", 1)
    assert "exit code 1 after 2 starts: not queued again" in desk.said(number)


def test_a_preflight_is_not_tried_again(desk: Desk) -> None:
    number = desk.submit("1", HOURGLASS_PROGRAM="preflight")
    assert desk.end(number) == ("FAILED", "1:0", 0)


@pytest.mark.cluster
def test_the_preflight_is_shown_and_ends_as_it_did(
    desk: Desk, tiny_config: Path, dataset: Path
) -> None:
    """A real one; then one that finds something."""
    machines = desk.folder / "cluster.yaml"
    machines.write_text("{nodes: 2, gpus_per_node: 1, join_minutes: 2}")
    command = [Path(sys.executable).with_name("hourglass"), "launch", "slurm", tiny_config]
    command += ["run.dir=looked", f"--cluster={machines}", "--preflight-only"]
    done = desk.slurm.run(*command, f"data.dataset={dataset}", cwd=desk.folder)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    number = re.match(r"job (\d+): look at looked/preflight-\1.out", done.stdout)
    assert number
    assert (desk.folder / f"looked/preflight-{number[1]}.out").read_text() in done.stdout
    done = desk.slurm.run(*command, "data.dataset=/nowhere", cwd=desk.folder)
    print(done.stdout)
    assert done.returncode == 2
    assert "error: " in done.stdout
    assert desk.slurm.job(str(int(number[1]) + 1))["Restarts"] == "0"


def test_a_cancelled_job_is_not_queued_again(desk: Desk) -> None:
    number = desk.submit("s60")
    wait_for(lambda: ": s60" in desk.said(number), 60, "its start")
    assert desk.slurm.run("scancel", number).returncode == 0
    wait_for(lambda: set(desk.slurm.states()) == {"idle"}, 60, "the script's end")
    assert desk.end(number)[0::2] == ("CANCELLED", 0)


@pytest.mark.cluster
def test_a_controller_that_is_away_for_a_while_is_waited_for(desk: Desk) -> None:
    """Nothing is lost when a job has to be queued again just then."""
    number = desk.submit("s5:75", "0")
    wait_for(lambda: ": s5" in desk.said(number), 60, "its start")
    desk.slurm.stop_controller()
    wait_for(lambda: "Unable to contact slurm controller" in desk.said(number), 60, "its question")
    desk.slurm.start_controller()
    assert desk.end(number) == ("COMPLETED", "0:0", 1)


@pytest.mark.cluster
def test_with_fewer_nodes_the_others_go_on(desk: Desk) -> None:
    """NNODES=MIN:MAX: a node is lost, the other goes on to its end."""
    number = desk.submit("s60", options="--nodes=1-2 --no-kill", NNODES="1:2", SHUTDOWN_TIMEOUT="1")
    wait_for(lambda: desk.said(number).count("s60") == 2, 60, "its start")
    assert "0: 1:2 nodes" in desk.said(number)
    desk.slurm.kill_node(1)
    try:
        assert desk.end(number) == ("COMPLETED", "0:0", 0)
        assert "Node failure on sq1" in desk.said(number)
    finally:
        desk.slurm.start_node(1)
