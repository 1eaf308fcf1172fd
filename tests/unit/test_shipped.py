"""Bare names: which file they mean, and that it is said."""

from __future__ import annotations

from pathlib import Path

import pytest
from paths import CONFIGS

from data_tools.pipeline.settings import load_settings
from data_tools.sources.text_files import find_inputs
from hourglass_dist.bench.compare import Budget, read_arms
from hourglass_dist.config.loader import ConfigError
from hourglass_dist.config.schema import load
from hourglass_dist.launch.cluster import ClusterConfig, load_cluster


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_shipped_file_has_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    for file in CONFIGS.glob("*.yaml"):
        assert load(file.stem) == load(file)
        assert capsys.readouterr().err == f"{file.stem}: taking the shipped {file}\n"
    for file in CONFIGS.glob("prepare/*.yaml"):
        assert load_settings(file.stem) == load_settings(file)
    assert load_cluster(Path("cluster")) == ClusterConfig()
    assert read_arms(Path("compare"), Budget(Path("data"), 2e12, 8, 256))
    assert [path.name for path in find_inputs([Path("tinyshakespeare")])] == [
        "tinyshakespeare.txt.gz"
    ]


@pytest.mark.parametrize("own", ["quickstart", "quickstart.yaml"])
def test_a_file_of_that_name_wins(
    own: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (CONFIGS / "quickstart.yaml").read_text()
    (folder / own).write_text(text.replace("steps: 1150", "steps: 7"))
    assert load("quickstart").train.steps == 7
    words = f"quickstart: taking {own} in this folder, not the shipped one\n"
    assert capsys.readouterr().err == words


def test_a_folder_of_that_name_is_no_settings_file(folder: Path) -> None:
    (folder / "quickstart").mkdir()
    assert load("quickstart").train.steps == 1150


def test_only_the_first_rank_says_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    load("quickstart")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("quikstart", "quikstart: no such file; did you mean the shipped quickstart?"),
        ("configs/quickstart.yaml", "no such file; did you mean the shipped quickstart?"),
        ("xyz", "xyz: no such file; shipped with the package: base_zero2, large_zero3, "),
        ("a/xyz.yaml", "a/xyz.yaml: no such file"),
    ],
)
def test_an_unknown_name_is_one_line_with_the_nearest(name: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(name)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
