"""The launch scripts as a user starts them: exit codes and the words one sees."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command in a plain environment: only PATH, with this Python's programs first."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    plain = {"PATH": path, "HOME": os.environ.get("HOME", "/tmp"), "OMP_NUM_THREADS": "1"}
    words = [str(word) for word in command]
    given = plain | {"CUDA_VISIBLE_DEVICES": "", "VIRTUAL_ENV": sys.prefix} | environment
    return subprocess.run(words, capture_output=True, text=True, env=given, timeout=120)


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """What a mistake of the user must look like."""
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    return done.stderr


def test_every_script_is_valid_bash() -> None:
    for script in [*ROOT.glob("launch/*.sh"), *ROOT.glob("launch/*.sbatch"), ROOT / ".ci/run"]:
        assert run("bash", "-n", script).returncode == 0, script


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The part of a checkout that set-up reads; no environment in it."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_setup_refuses_a_python_that_is_not_there(checkout: Path) -> None:
    said = one_line(
        run("bash", checkout / "launch/setup.sh", VIRTUAL_ENV="", HOURGLASS_PYTHON="python3.1")
    )
    assert "needs Python 3.11 to 3.13, but python3.1 is not there" in said
    assert not (checkout / ".venv").exists()


def test_setup_refuses_what_is_no_environment(checkout: Path) -> None:
    said = one_line(
        run("bash", checkout / "launch/setup.sh", VIRTUAL_ENV=str(checkout / "nowhere"))
    )
    assert "no virtual environment" in said


def test_setup_refuses_an_unknown_build_of_torch(checkout: Path) -> None:
    said = one_line(run("bash", checkout / "launch/setup.sh", HOURGLASS_TORCH="rocm"))
    assert "expected cpu or cuda, given rocm" in said


def test_torchrun_says_a_mistake_in_the_settings_once() -> None:
    config = ROOT / "configs/quickstart.yaml"
    said = one_line(run("bash", ROOT / "launch/torchrun.sh", config, "model.dmi=3"))
    assert "did you mean model.dim?" in said


def test_torchrun_needs_an_address_for_several_nodes() -> None:
    config = ROOT / "configs/quickstart.yaml"
    said = one_line(run("bash", ROOT / "launch/torchrun.sh", config, NNODES="2"))
    assert "MASTER_ADDR" in said


MISTAKE = "print('error: bad', file=sys.stderr) if rank == 0 else 0; sys.exit(2)"
KILLED = "os.kill(os.getpid(), 9) if rank == 1 else time.sleep(60)"
PROGRAMS = {
    "done": ("", 0, ""),
    "mistake": (MISTAKE, 2, "error: bad\n"),
    "killed": (KILLED, 137, "rank 1 was ended by SIGKILL"),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_torchrun_ends_as_its_ranks_do(name: str, tmp_path: Path) -> None:
    body, code, words = PROGRAMS[name]
    program = tmp_path / "program.py"
    program.write_text(f"import os, sys, time\nrank = int(os.environ['RANK'])\n{body}\n")
    options = ("--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2")
    done = run(sys.executable, "-m", "hourglass_dist.launch.agent", *options, program)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith(words)
    assert len(done.stderr.splitlines()) <= 1


@pytest.mark.slow
@pytest.mark.parametrize(("name", "code"), [("done", 0), ("mistake", 2), ("killed", 203)])
def test_a_scheduler_may_be_told_to_try_again(name: str, code: int, tmp_path: Path) -> None:
    """Some know no codes of their own, only those that ask for another try."""
    program = tmp_path / "program.py"
    body = PROGRAMS[name][0]
    program.write_text(f"import os, sys, time\nrank = int(os.environ['RANK'])\n{body}\n")
    options = ("--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2")
    command = (sys.executable, "-m", "hourglass_dist.launch.agent", *options, program)
    assert run(*command, RETRY_EXIT_CODE="203").returncode == code
