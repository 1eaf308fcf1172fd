"""Checkpoints are whole or not there: every way to damage one is noticed, and named."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from checkpoints import make, progress, save, take
from paths import HELPERS
from ranks import hourglass

from hourglass_dist.checkpoint.save import Checkpoints, complete, latest, tag, verify
from hourglass_dist.engine import sharded_state
from hourglass_dist.engine.sharded_state import Key


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    made = make(tmp_path / "checkpoints")
    for step in (5, 10):
        save(made, step)
    return made


def test_the_newest_is_found_with_its_progress(checkpoints: Checkpoints) -> None:
    found = checkpoints.newest()
    assert found is not None
    assert found[0].name == tag(10)
    assert found[1] == progress(10)


def test_only_the_newest_are_kept(checkpoints: Checkpoints) -> None:
    save(checkpoints, 15)
    assert [path.name for path in complete(checkpoints.folder)] == [tag(10), tag(15)]


def test_any_range_is_read_back(checkpoints: Checkpoints) -> None:
    reader = sharded_state.Reader(checkpoints.folder / tag(10))
    assert torch.equal(reader.full("fp32", "w"), torch.arange(600.0).reshape(20, 30))
    assert torch.equal(reader.read("fp32", "w", 390, 20), torch.arange(390.0, 410.0))
    assert reader.optimizer_steps == 7
    with pytest.raises(ValueError, match="elements 600 to 610 are in no file"):
        reader.read("fp32", "w", 590, 20)


def test_every_nth_and_the_best_stay(tmp_path: Path) -> None:
    kept = make(tmp_path / "checkpoints", keep=1, keep_every=20, keep_best=True)
    for step, score in ((5, 3.0), (10, 2.0), (15, None), (20, 2.5), (25, 2.1), (30, None)):
        save(kept, step, score)
    assert [path.name for path in complete(kept.folder)] == [tag(10), tag(20), tag(30)]


def test_training_goes_on_with_the_state_while_it_is_written(tmp_path: Path) -> None:
    """The state changes as soon as ``save`` returns; the checkpoint has it as it was."""
    weight = torch.zeros(2_000_000)
    kept, buffers = make(tmp_path / "checkpoints"), sharded_state.PinnedBuffers()

    def take_weight() -> sharded_state.Snapshot:
        return buffers.snapshot([(Key("fp32", "w", 0), weight)], {"w": weight.shape}, 1, {})

    for step in range(1, 6):
        weight.fill_(step)
        kept.save(take_weight, progress(step))
        weight.fill_(-1)
    kept.finish()
    for path, value in zip(complete(kept.folder), (4, 5), strict=True):
        assert sharded_state.Reader(path).full("fp32", "w").eq(value).all()


def test_a_lost_run_folder_comes_back_from_its_remote(tmp_path: Path) -> None:
    here, there = tmp_path / "checkpoints", tmp_path / "mirror"
    kept = make(here, keep=1, remote=there.as_uri())
    for step in (5, 10):
        save(kept, step)
    assert sorted(os.listdir(there)) == ["latest", tag(10)]
    assert kept.news()[-1] == f"step 10: {there.as_uri()}: copied"
    shutil.rmtree(here)
    found = make(here, remote=there.as_uri()).newest()
    assert found is not None
    assert found[1] == progress(10)
    assert torch.equal(
        sharded_state.Reader(found[0]).full("fp32", "w").flatten(), torch.arange(600.0)
    )
    data = (there / tag(10) / "rank_00000.safetensors").read_bytes()
    (there / tag(10) / "rank_00000.safetensors").write_bytes(data[:-1] + b"x")
    shutil.rmtree(here)
    with pytest.raises(ValueError, match="expected crc32c"):
        make(here, remote=there.as_uri()).newest()


def test_a_mirror_that_cannot_be_written_costs_only_the_copy(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    kept = make(tmp_path / "checkpoints", remote=(tmp_path / "file" / "mirror").as_uri())
    save(kept, 5)
    assert kept.news()[0].startswith("step 5: saved ")
    save(kept, 10)
    assert "could not be copied: rank 0: " in kept.news()[-1]
    assert len(complete(kept.folder)) == 2


def test_a_step_taken_again_from_an_older_checkpoint_is_kept(checkpoints: Checkpoints) -> None:
    """Back to step 5 and on: step 6 is now the newest, and step 10 a future that was given up."""
    (checkpoints.folder / "latest").write_text(tag(5) + "\n")
    save(checkpoints, 6)
    assert [path.name for path in complete(checkpoints.folder)] == [tag(5), tag(6)]
    found = checkpoints.newest()
    assert found is not None
    assert found[1].step == 6


@pytest.mark.parametrize("name", [sharded_state.file_name(0), "manifest.json"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_damage_is_named_and_the_one_before_is_taken(
    checkpoints: Checkpoints, name: str, damage: str
) -> None:
    file = checkpoints.folder / tag(10) / name
    if damage == "remove":
        file.unlink()
    else:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data[: len(data) // 2] if damage == "truncate" else data)
    found = checkpoints.newest()
    assert found is not None
    assert found[1].step == 5
    [problem] = checkpoints.passed_over
    assert f"{tag(10)}" in problem
    assert name in problem
    assert "\n" not in problem
    shutil.rmtree(checkpoints.folder / tag(5))
    with pytest.raises(ValueError, match="; there is no other good checkpoint"):
        checkpoints.newest()


def test_every_flipped_byte_of_the_state_is_noticed(checkpoints: Checkpoints) -> None:
    file = checkpoints.folder / tag(10) / sharded_state.file_name(0)
    whole = file.read_bytes()
    for position in range(0, len(whole), 97):
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 64]) + whole[position + 1 :])
        with pytest.raises(ValueError, match="crc32c"):
            verify(checkpoints.folder / tag(10))


def test_latest_naming_a_missing_checkpoint(checkpoints: Checkpoints) -> None:
    (checkpoints.folder / "latest").write_text("step_00000099\n")
    found = checkpoints.newest()
    assert found is not None
    assert found[1].step == 10
    assert "step_00000099: no such checkpoint" in checkpoints.passed_over[0]


def test_without_latest_the_newest_complete_one_counts(checkpoints: Checkpoints) -> None:
    (checkpoints.folder / "latest").unlink()
    (checkpoints.folder / tag(99)).mkdir()  # no manifest: never completed
    newest = latest(checkpoints.folder)
    assert newest is not None
    assert newest.name == tag(10)


def test_a_failed_write_leaves_the_last_one_and_the_next_save_clears_up(
    checkpoints: Checkpoints,
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (1000, limits[1])
    )  # the disk is full after 1000 bytes
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        checkpoints.save(take, progress(15))
        checkpoints.wait()
        line = checkpoints.news()[-1]
        assert line.startswith("step 15: could not be saved: rank 0: ")
        assert "rank_00000.safetensors: cannot be written" in line
        with pytest.raises(ValueError, match=r"rank_00000\.safetensors: cannot be written"):
            save(checkpoints, 16)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    found = checkpoints.newest()
    assert found is not None
    assert found[1].step == 10
    save(checkpoints, 20)
    assert sorted(os.listdir(checkpoints.folder)) == ["latest", tag(10), tag(20)]


SAVE_FOREVER = """
import sys
import time
from pathlib import Path
sys.path.insert(0, {helpers!r})
from checkpoints import make, save
checkpoints = make(Path({folder!r}))
for step in range(1, 100_000):
    save(checkpoints, step)
    print(step, flush=True)
"""


@pytest.mark.slow
def test_killed_at_any_instant_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """A process that does nothing but save, killed 12 times at arbitrary moments of it."""
    folder = tmp_path / "checkpoints"
    script = SAVE_FOREVER.format(helpers=str(HELPERS), folder=str(folder))
    reader = make(folder)
    for attempt in range(12):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(3)][-1]
        time.sleep(attempt * 0.0017)  # spread over the next save
        process.kill()
        process.wait()
        process.stdout.close()
        found = reader.newest()
        assert found is not None
        assert found[1].step >= int(said)


def test_the_command_lists_verifies_and_deletes(run_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(run_folder, run)
    listed = hourglass("checkpoint", "list", run).stdout.splitlines()
    assert [line.split()[0] for line in listed] == ["step", "15", "20"]
    assert listed[2].endswith("bits/byte  (latest)")
    assert hourglass("checkpoint", "verify", run).stdout.count(": whole\n") == 2
    file = run / "checkpoints" / tag(15) / sharded_state.file_name(1)
    file.write_bytes(file.read_bytes()[:-1])
    done = hourglass("checkpoint", "verify", run)
    assert done.returncode == 2
    assert f"{file}: expected" in done.stdout
    assert done.stderr == f"error: {run}: 1 of 2 checkpoints are damaged\n"
    kept = hourglass("checkpoint", "delete", run, 15, 20)
    assert kept.returncode == 2
    assert "is the newest, from which the run resumes: it stays" in kept.stderr
    assert hourglass("checkpoint", "delete", run, 15).returncode == 0
    assert [path.name for path in complete(run / "checkpoints")] == [tag(20)]
    nothing = hourglass("checkpoint", "list", tmp_path)
    assert nothing.stderr == (
        f"error: {tmp_path}: expected a run folder (with config.yaml), found none\n"
    )
