"""What several tests need: real shards of a real text, a small run, its export."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings
from paths import CORPUS
from ranks import hourglass, torchrun
from tiny_run import TINY

settings.register_profile("thorough", max_examples=10_000, deadline=None)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of Tiny Shakespeare as bytes, the last tenth held out."""
    folder = tmp_path_factory.mktemp("data") / "tinyshakespeare"
    done = hourglass(
        *("data", "shard", CORPUS, "--out", folder, "--held-out", "last:0.1"),
        *("--block-tokens", 16384, "--shard-blocks", 4),
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Settings of a run that takes seconds."""
    path = tmp_path_factory.mktemp("configs") / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory, tiny_config: Path, dataset: Path) -> Path:
    """A finished run of two ranks at ZeRO stage 2."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    done = torchrun(
        2,
        *("-m", "hourglass_dist.train", str(tiny_config), f"data.dataset={dataset}"),
        *(f"run.dir={folder}", "deepspeed.zero_optimization.stage=2"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, run_folder: Path) -> Path:
    """The export of that run."""
    folder = tmp_path_factory.mktemp("exports") / "tiny"
    done = hourglass("export", run_folder, folder)
    assert done.returncode == 0, done.stderr
    return folder
