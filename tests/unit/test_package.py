"""What travels in a wheel, and that it works anywhere, with the core dependencies alone."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from installs import Install
from paths import ROOT

import hourglass_dist
from hourglass_dist.cli import app

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SHORT = ("train.steps=4", "checkpoint.every=2", "eval.every=4", "train.micro_batch_size=16")


def test_every_folder_of_the_code_is_packed() -> None:
    folders = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for package in ("hourglass_dist", "data_tools")
        for path in (ROOT / package).rglob("*.py")
    }
    packed = set(PROJECT["tool"]["setuptools"]["packages"])
    assert folders <= packed
    for name in packed - folders:
        inside = name.removeprefix("hourglass_dist.shipped.").replace(".", "/")
        assert any((ROOT / inside).iterdir()), name


def examples(command: Any, words: tuple[str, ...] = ("hourglass",)) -> Iterator[list[str]]:
    """The examples in the help of every command below ``command``."""
    for name, inner in getattr(command, "commands", {}).items():
        yield from examples(inner, (*words, name))
    texts = re.findall(r"Example:\s+(hourglass .*)", command.help or "")
    assert texts or hasattr(command, "commands"), f"{words} has no example"
    yield from map(shlex.split, texts)


EXAMPLES = list(examples(typer.main.get_command(app)))
SETS = {"data", "bench", "checkpoint"}


def chain() -> list[list[str]]:
    """The examples that need no extra package and take seconds, each after what it needs."""
    order = [
        *("data tokenizer", "data shard", "data inspect", "data verify", "data reshard"),
        *("data merge", "data diff", "data export-text", "bench compare", "bench data"),
        *("train", "status", "checkpoint list", "checkpoint verify", "checkpoint delete"),
        *("report", "export", "evaluate", "generate", "config", "plan", "launch"),
    ]
    by_name: dict[str, list[list[str]]] = {}
    for words in EXAMPLES:
        name = " ".join(words[1:3] if words[1] in SETS else words[1:2])
        by_name.setdefault(name, []).append(words)
    return [words for name in order for words in by_name[name]]


@pytest.fixture(scope="module", params=["wheel", "editable", "checkout"])
def install(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Install:
    return Install(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.slow
def test_an_own_text_is_trained_on_from_an_empty_folder(install: Install) -> None:
    text = "To be, or not to be, that is the question.\n"
    (install.empty / "mine.txt").write_text(text * 500)
    assert install.hourglass("--version") == f"hourglass_dist {hourglass_dist.__version__}\n"
    settings = yaml.safe_load(install.hourglass("config", "quickstart"))
    assert settings["model"]["dim"] == 128
    options = ("--held-out", "last:0.1", "--block-tokens", "2048", "--out", "data/mine")
    assert "data/mine: train " in install.hourglass("data", "shard", "mine.txt", *options)
    common = ("quickstart", "data.dataset=data/mine", *SHORT)
    assert "step 4: held out" in install.hourglass("train", *common, "run.dir=runs/one")

    printed = install.hourglass("launch", "torchrun", *common, "run.dir=runs/two", "--print")
    done = install.run(["bash", "-c", printed])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 x cpu" in done.stdout
    assert "step 4: saved runs/two/checkpoints" in done.stdout


@pytest.mark.slow
def test_printed_commands_name_files_that_exist(install: Install) -> None:
    (install.empty / "hosts").write_text("no-such-host.invalid slots=2\n")
    (install.empty / "mine.yaml").write_text(
        "ssh: {hostfile: hosts}\nkubernetes: {volumes: [{claim: shared, path: /data}]}\n"
    )
    options = ("run.dir=/data/mine", "--cluster", "mine.yaml", "--print")
    for target in ("torchrun", "ssh", "slurm"):
        printed = shlex.split(install.hourglass("launch", target, "quickstart", *options))
        files = [word for word in printed if word.startswith("/")]
        assert len(files) >= 2, printed
        assert all(Path(file).exists() for file in files), printed
        if target == "ssh":
            begin = printed.index(files[0])
            done = install.run(printed[begin:])
            assert done.returncode == 2
            assert done.stderr.startswith("error: no-such-host.invalid: ")
    for kind in ("job", "jobset", "trainjob", "pytorchjob"):
        (install.empty / "mine.yaml").write_text(
            f"kubernetes: {{kind: {kind}, volumes: [{{claim: shared, path: /data}}]}}\n"
        )
        filled = install.hourglass("launch", "k8s", "quickstart", *options)
        settings, *_ = yaml.safe_load_all(filled)
        assert "data/tinyshakespeare" in settings["data"]["config.yaml"]


@pytest.mark.slow
@pytest.mark.parametrize("install", ["wheel"], indirect=True)
def test_the_examples_work_when_pasted(install: Install) -> None:
    for words in chain():
        given = list(words[1:])
        if words[1] == "train":
            given += SHORT
        if words[1:3] == ["checkpoint", "delete"]:
            given[-1] = "2"  # of the four steps that the shortened run has
        assert install.hourglass(*given), words


@pytest.mark.slow
@pytest.mark.parametrize("install", ["wheel"], indirect=True)
def test_what_needs_an_extra_says_so_in_one_line(install: Install) -> None:
    for words in (["data", "prepare", "bytes"], ["bench", "prepare", "tinyshakespeare"]):
        done = install.run([*install.command, *words])
        assert done.returncode == 2, done.stderr
        [line] = [line for line in done.stderr.splitlines() if ": taking " not in line]
        assert line.endswith("pip install 'hourglass_dist[prepare]'")
