"""What ``launch.ssh`` refuses before anything starts, and the line on which its commands hang."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT
from ranks import hourglass

from hourglass_dist.launch.hostfile import read_hostfile
from hourglass_dist.launch.ssh import outcome

MISTAKES = {
    "a slots=2\nb slots=2\na slots=2": "line 3: a is there twice",
    "a slots=2\nb slots=0": "line 2: b: expected at least one slot, given 0",
    "a slots=8\n\n# old\nb slots=4": "line 4: b has 4 slots and a has 8; all nodes need equally",
    "a slots=2\nb 2": "line 2: expected 'HOST slots=RANKS', given 'b 2'",
    "-oProxyCommand=x slots=2": "line 1: expected 'HOST slots=RANKS'",
    "# nobody\n": "no hosts; expected a line 'HOST slots=RANKS' for each node",
}


@pytest.fixture
def hostfile(tmp_path: Path) -> Path:
    return tmp_path / "hostfile"


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_in_the_hostfile_is_one_line(text: str, hostfile: Path) -> None:
    hostfile.write_text(text)
    with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
        read_hostfile(hostfile)
    assert str(hostfile) in str(caught.value)
    assert MISTAKES[text] in str(caught.value)


def test_a_hostfile_is_read_with_comments(hostfile: Path) -> None:
    hostfile.write_text("# two\nnode0 slots=8\n\n me@node1.lab  slots=8 # new\n")
    assert read_hostfile(hostfile) == (["node0", "me@node1.lab"], 8)


def start(*arguments: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "hourglass_dist.launch.ssh", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=100)


def test_a_host_that_does_not_exist_is_named_before_anything_starts(hostfile: Path) -> None:
    hostfile.write_text("no-such-host.invalid slots=2\n")
    done = start(hostfile, ROOT / "configs/quickstart.yaml")
    assert done.returncode == 2
    assert done.stderr.startswith("error: no-such-host.invalid: ")
    assert len(done.stderr.splitlines()) == 1


def test_launch_counts_nodes_and_ranks_in_the_hostfile(hostfile: Path) -> None:
    hostfile.write_text("a slots=8\nb slots=8\n")
    cluster = hostfile.with_name("cluster.yaml")
    cluster.write_text(f"ssh: {{hostfile: {hostfile}}}\nenvironment: {{NCCL_IB_HCA: mlx5}}")
    config = ROOT / "configs/base_zero2.yaml"
    done = hourglass("launch", "ssh", config, "--cluster", cluster, "--print")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("NNODES=2 ")
    assert "NPROC_PER_NODE=8" in done.stdout
    assert f"-m hourglass_dist.launch.ssh --pass=NCCL_IB_HCA {hostfile} {config}\n" in done.stdout
    hostfile.write_text("a slots=8\nb slots=7\n")
    done = hourglass("launch", "ssh", config, "--cluster", cluster, "--print")
    assert done.returncode == 2
    assert "line 2: b has 7 slots" in done.stderr


def test_launch_ssh_needs_a_hostfile() -> None:
    config = ROOT / "configs/quickstart.yaml"
    done = hourglass("launch", "ssh", config, "--cluster", ROOT / "launch/cluster.yaml", "--print")
    assert done.returncode == 2
    assert "ssh.hostfile: the cluster file must name one" in done.stderr


@pytest.mark.parametrize(
    ("codes", "is_stopped", "code"),
    [
        ([0, 0], False, 0),
        ([137, 2], False, 2),
        ([75, 75], False, 75),
        ([75, 143], True, 75),
        ([255, 75], False, 1),
        ([0, 137], False, 137),
        ([0, 255], False, 0),
        ([], False, 1),
        ([], True, 75),
    ],
)
def test_the_exit_code_says_most(codes: list[int], is_stopped: bool, code: int) -> None:
    assert outcome(codes, is_stopped) == code


UP = "import signal, sys, time; print('up', flush=True)"
SAVES = f"""signal.signal(15, lambda *_: (time.sleep(1), print("saved"), sys.exit(75)))
{UP}; time.sleep(60)"""
DEAF = f"signal.signal(15, signal.SIG_IGN); {UP}; time.sleep(60)"


def hang(program: str) -> subprocess.Popen[str]:
    """A program on a line; it is up."""
    words = [sys.executable, "-c", f"import signal, sys, time; {program}"]
    process = subprocess.Popen(
        ["bash", str(ROOT / "launch/lifeline.sh"), "3", *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout
    assert process.stdout.readline() == "up\n"
    return process


@pytest.mark.parametrize(("program", "code", "last"), [(SAVES, 75, "saved"), (DEAF, 137, "")])
@pytest.mark.parametrize("is_heard", [True, False])
def test_a_command_ends_when_its_line_is_cut(
    program: str, code: int, last: str, is_heard: bool
) -> None:
    """A launcher that is killed takes its end of the output with it."""
    process = hang(program)
    assert process.stdin
    assert process.stdout
    if not is_heard:
        process.stdout.close()
    process.stdin.close()
    if is_heard:
        assert last in process.stdout.read()
    assert process.wait(timeout=60) == code


def test_a_command_ends_as_it_does_by_itself() -> None:
    assert hang(f"{UP}; sys.exit(2)").wait(timeout=60) == 2
