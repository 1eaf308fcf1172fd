"""Mistakes of a user: one clear line on stderr, exit code 2, no traceback, nothing written."""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from ranks import commands, environment, hourglass, kill_tree, torchrun, torchrun_command

from hourglass_dist import train
from hourglass_dist.inference.export import export, load_export


@pytest.fixture
def mine(dataset: Path, tmp_path: Path) -> Path:
    """A copy of the dataset that a test may damage."""
    return Path(shutil.copytree(dataset, tmp_path / "mine"))


@pytest.fixture
def refused(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs the training program on settings that it must refuse; returns its one line."""

    def run(*overrides: object) -> str:
        before = listing(tmp_path)
        code = train.main([str(tiny_config), f"run.dir={tmp_path / 'run'}", *map(str, overrides)])
        out, err = capsys.readouterr()
        assert code == 2
        assert out == ""
        assert listing(tmp_path) == before, "nothing is written"
        [line] = err.splitlines()
        assert line.startswith("error: ")
        return line

    return run


def listing(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_size for p in folder.rglob("*") if p.name != "lock"}


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-512])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def make_newer(path: Path) -> None:
    index = path.parent / "index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"format": 99}))


def swap(path: Path) -> None:
    other = path.with_name("train-000000.tar")
    path.rename(path.with_name("held"))
    other.rename(path)
    path.with_name("held").rename(other)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (cut, "train-000003.tar: truncated shard: expected "),
        (flip, "train-000003.tar: altered shard: expected sha256 "),
        (Path.unlink, "train-000003.tar: missing shard"),
        (lambda path: shutil.copy(path, path.with_name("train-000099.tar")), "extra shard"),
        (swap, "altered shard"),
        (make_newer, "written by a newer version: format 99"),
        (lambda path: shutil.rmtree(path.parent), "expected a dataset folder, found none"),
        (lambda path: (path.parent / "index.json").unlink(), "no dataset here"),
        (lambda path: (path.parent / "tokenizer.json").unlink(), "expected a tokenizer"),
        (lambda path: flip(path.parent / "index.json"), "index.json: "),
    ],
)  # fmt: skip
def test_damaged_dataset(
    mine: Path, refused: Callable[..., str], damage: Callable[[Path], object], expected: str
) -> None:
    damage(mine / "train-000003.tar")
    assert expected in refused(f"data.dataset={mine}")


def test_settings_that_do_not_fit_the_data(dataset: Path, refused: Callable[..., str]) -> None:
    line = refused(f"data.dataset={dataset}", "data.seq_len=48")
    assert "sequence length: 48 does not divide the blocks of 16384 tokens" in line
    assert "near lengths that do: " in line
    line = refused(f"data.dataset={dataset}", "model.vocab_size=200")
    assert "model.vocab_size: the tokenizer of" in line


def test_a_writer_that_is_not_installed(refused: Callable[..., str]) -> None:
    assert refused("metrics.writers=[tensorboard,mlflow]") == (
        "error: metrics.writers: the package mlflow is not installed: pip install mlflow, or leave "
        "it out"
    )


def test_profiled_steps_in_the_wrong_order(refused: Callable[..., str]) -> None:
    assert "metrics.profile_steps: expected the first and the last" in refused(
        "metrics.profile_steps=[5,4]"
    )


@pytest.mark.slow
def test_another_run_in_the_same_folder(
    tiny_config: Path,
    dataset: Path,
    run_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [str(tiny_config), f"data.dataset={dataset}", f"run.dir={run_folder}"]
    before = listing(run_folder)
    assert train.main([*arguments, "optim.lr=2e-3", "model.levels.1.layers=3"]) == 2
    line = capsys.readouterr().err
    assert "optim.lr: 0.001 -> 0.002" in line
    assert "model.levels.1.layers: 2 -> 3" in line
    assert "deepspeed" not in line  # the state can be read at any stage
    assert listing(run_folder) == before

    arguments.append("deepspeed.zero_optimization.stage=2")
    with (run_folder / "lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert train.main(arguments) == 2
    assert "is training in this folder" in capsys.readouterr().err


def test_damaged_newest_checkpoint(
    tiny_config: Path, dataset: Path, run_folder: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(run_folder, tmp_path / "run"))
    text = (run / "config.yaml").read_text().replace(str(run_folder), str(run))
    (run / "config.yaml").write_text(text)
    flip(run / "checkpoints" / "step_00000020" / "rank_00001.safetensors")
    command = [str(tiny_config), f"data.dataset={dataset}", f"run.dir={run}"]
    with pytest.raises(ValueError, match=r"rank_00001\.safetensors: expected crc32c"):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    done = hourglass("train", *command, "deepspeed.zero_optimization.stage=2")
    assert done.returncode == 0, done.stderr
    assert "passed over a damaged checkpoint: " in done.stdout
    assert "step_00000020/rank_00001.safetensors: expected crc32c" in done.stdout
    assert "continuing after step 15" in done.stdout


def test_exports(exported: Path, run_folder: Path, tmp_path: Path, dataset: Path) -> None:
    with pytest.raises(ValueError, match="already exists"):
        export(run_folder, exported)
    with pytest.raises(ValueError, match="expected a run folder"):
        export(tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match="no such checkpoint"):
        export(run_folder, tmp_path / "out", step=7)
    with pytest.raises(ValueError, match="expected an export"):
        load_export(dataset)
    broken = Path(shutil.copytree(exported, tmp_path / "broken"))
    cut(broken / "model.safetensors")
    with pytest.raises(ValueError, match="not a readable export"):
        load_export(broken)
    about = json.loads((exported / "config.json").read_text())
    for level in about["model"]["levels"]:
        level["dim"] = 48
    (broken / "config.json").write_text(json.dumps(about))
    shutil.copy(exported / "model.safetensors", broken)
    with pytest.raises(ValueError, match=r"the model has shape \(\d+, 48\)|has shape \(48,"):
        load_export(broken)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_ranks_that_do_not_divide_the_batch(
    tiny_config: Path, dataset: Path, tmp_path: Path
) -> None:
    """All ranks stop, one of them says why."""
    run = tmp_path / "run"
    done = torchrun(
        3, "-m", "hourglass_dist.train", tiny_config, f"data.dataset={dataset}", f"run.dir={run}"
    )
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "world sizes that can: 1, 2, 4" in lines[0]
    assert "Traceback" not in done.stderr
    assert not run.exists()


def test_one_rank_finds_the_damage_and_all_stop(
    tiny_config: Path, mine: Path, tmp_path: Path
) -> None:
    """Ranks verify different shards: what one of them finds ends all of them, with its words."""
    flip(mine / "train-000005.tar")
    done = torchrun(
        2, "-m", "hourglass_dist.train", tiny_config, f"data.dataset={mine}", "run.dir=unused"
    )
    assert done.returncode == 2
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "train-000005.tar: altered shard" in line


@pytest.mark.slow
def test_damage_in_the_middle_of_a_run_ends_all_ranks_with_one_line(
    tiny_config: Path, mine: Path, tmp_path: Path
) -> None:
    """A held-out shard that the second rank checks is altered between two evaluations."""
    run = tmp_path / "run"
    settings = [f"data.dataset={mine}", f"run.dir={run}", "train.steps=5000", "eval.every=5"]
    process = subprocess.Popen(
        torchrun_command(2, "-m", "hourglass_dist.train", str(tiny_config), *settings),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    log, deadline = run / "metrics.jsonl", time.monotonic() + 120
    while not (log.exists() and "heldout/loss" in log.read_text()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    flip(mine / "heldout-000001.tar")
    try:
        _, stderr = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            kill_tree(process)
    assert process.returncode == 2
    assert "Traceback" not in stderr
    [line] = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert "heldout-000001.tar: altered shard" in line


def test_the_command_line_ends_with_2_and_no_traceback(exported: Path, tmp_path: Path) -> None:
    given = (
        ("config", "configs/none.yaml"),
        ("train", tmp_path / "none.yaml"),
        ("export", tmp_path, tmp_path / "out"),
        ("evaluate", exported, "--data", tmp_path),
        ("generate", tmp_path, "--prompt", "x"),
        ("generate", exported, "--prompt", "x", "--temperature", "-1"),
        ("nonsense",),
    )
    for done in commands(*given):
        assert done.returncode == 2, done
        assert "Traceback" not in done.stderr, done
        assert done.stdout == "", done
        assert done.stderr.strip(), done
