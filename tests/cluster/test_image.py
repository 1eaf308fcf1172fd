"""launch/Dockerfile: what a linter says, what it is given, and that it fits the manifests."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from image import context, instructions, is_sent
from paths import ROOT

from hourglass_dist.config.loader import read_documents

DOCKERFILE = ROOT / "launch/Dockerfile"
STEPS = instructions(DOCKERFILE.read_text())


def lint(path: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("hadolint")
    return subprocess.run([program, path], capture_output=True, text=True, timeout=60)


def test_the_linter_has_nothing_to_say() -> None:
    done = lint(DOCKERFILE)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ("FROM ${BASE}", "FROM nvidia/cuda", "DL3006"),
        ("WORKDIR /workspace", "WORKDIR workspace", "DL3000"),
        ("USER 10001", "USER root", "DL3002"),
        ("    && rm -rf /var/lib/apt/lists/* \\\n", "", "DL3009"),
        ("--no-install-recommends ", "", "DL3015"),
        (
            'ENTRYPOINT ["bash", "launch/torchrun.sh"]',
            "ENTRYPOINT bash launch/torchrun.sh",
            "DL3025",
        ),
    ],
)
def test_the_linter_would_say_something(old: str, new: str, rule: str, tmp_path: Path) -> None:
    text = DOCKERFILE.read_text()
    assert old in text
    (tmp_path / "Dockerfile").write_text(text.replace(old, new))
    assert rule in lint(tmp_path / "Dockerfile").stdout


def test_the_base_fits_the_cuda_of_torch() -> None:
    pins = (ROOT / "launch/constraints-cuda.txt").read_text()
    (toolkit,) = [line for line in pins.splitlines() if line.startswith("cuda-toolkit==")]
    version = toolkit.partition("==")[2].rpartition(".")[0]
    assert STEPS[0] == ("ARG", f"BASE=nvidia/cuda:{version}-base-ubuntu24.04")


def test_a_build_is_given_the_code_alone() -> None:
    sent = context(ROOT)
    assert {path.split("/")[0] for path in sent} == {
        *("configs", "data_tools", "hourglass_dist", "launch"),
        *("LICENSE", "README.md", "pyproject.toml"),
    }
    assert "launch/torchrun.sh" in sent
    assert not is_sent("launch/__pycache__/torchrun.cpython-312.pyc", ["*", "!launch", "**/*.pyc"])


def test_manifests_run_what_the_image_has() -> None:
    steps = dict(STEPS)
    for kind in ("job", "jobset", "trainjob", "pytorchjob"):
        text = (ROOT / f"launch/k8s/{kind}.yaml").read_text()
        assert f"command: [{', '.join(json.loads(steps['ENTRYPOINT']))}]" in text
        assert f"runAsUser: {steps['USER']}\n" in text
        assert read_documents(ROOT / f"launch/k8s/{kind}.yaml")
