"""Each file in configs/prepare/ loads, and every setting is used by one; mistakes are one line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from paths import ROOT
from ranks import hourglass
from slow_cases import every
from written_keys import written_keys

from data_tools.datasets.verify import verify
from data_tools.pipeline.settings import Prepare, load_settings
from hourglass_dist.config.loader import paths, read_yaml, to_yaml

FILES = sorted((ROOT / "configs" / "prepare").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_says_the_same_after_a_round_trip(file: Path, tmp_path: Path) -> None:
    settings = load_settings(file)
    (tmp_path / "copy.yaml").write_text(to_yaml(settings))
    assert load_settings(tmp_path / "copy.yaml") == settings
    assert f"hourglass data prepare configs/prepare/{file.name}" in file.read_text()


def test_every_setting_is_used_by_a_file() -> None:
    schema = {path for path, _ in paths(Prepare)}
    used = {key for file in FILES for key in written_keys(read_yaml(file), schema)}
    assert not schema - used


def test_every_setting_is_described() -> None:
    assert not [path for path, description in paths(Prepare) if not description]


def test_the_small_one_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "configs" / "prepare" / "bytes.yaml", tmp_path / "bytes.yaml")
    planned = hourglass("data", "prepare", "bytes.yaml", "--dry-run")
    assert planned.returncode == 0, planned.stderr
    assert "plays: 1 files" in planned.stdout
    assert not (tmp_path / "data").exists()
    done = hourglass("data", "prepare", "bytes.yaml")
    assert done.returncode == 0, done.stderr
    assert "documents 7,222 = kept" in done.stdout
    verify(tmp_path / "data" / "bytes" / "plays")
    again = hourglass("data", "prepare", "bytes.yaml")
    assert "already there" in again.stdout


MISTAKES = {
    "held_out=all": "command line: held_out: expected hash:0.01, last:0.1, input:PATH or none",
    "held_out=input:x": "expected hash:0.01, last:0.1 or none, given an input",
    "executor.kind=dask": 'executor.kind: expected local, ray or slurm, given "dask"',
    "filters.rules=[gopher]": "expected gopher_repetition, gopher_quality, c4 or fineweb",
    "sources.0.name=Big": "sources.0.name: string should match pattern",
    "sources.0.name=work": "'work' is the name of another folder in out",
    "sources.0.inputs=[missing]": "missing: no such file or folder",
    "tokenizer.kind=folder": "tokenizer.folder: expected with tokenizer.kind=folder, and only then",
    "dedup.minhsh={}": "dedup.minhsh: unknown key (given {}); did you mean dedup.minhash?",
    "filters.language={model: none.bin, keep: [en]}": "none.bin: no fastText model",
}


@pytest.mark.parametrize("override", every(4, MISTAKES))
def test_mistakes_are_one_line(
    override: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = hourglass("data", "prepare", ROOT / "configs" / "prepare" / "bytes.yaml", override)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert MISTAKES[override] in done.stderr
