"""The blocks of the README, run as they stand there, in a folder with a text of one's own."""

from __future__ import annotations

import gzip
import re
import subprocess
import sys
from pathlib import Path

import pytest
from paths import CORPUS, ROOT
from ranks import environment

README = (ROOT / "README.md").read_text()


def blocks(language: str, heading: str) -> list[str]:
    """The blocks of a language under a heading of the README."""
    section = README.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    assert section, f"the README has no heading {heading!r}"
    return re.findall(rf"^```{language}\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)


def run(command: list[str], folder: Path) -> str:
    """What a command prints; it must end well."""
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment() | {"PATH": f"{Path(sys.executable).parent}:{environment()['PATH']}"},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_an_own_text_becomes_a_model_that_answers_from_python(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    text = gzip.decompress(CORPUS.read_bytes()).decode()
    for number, part in enumerate(text.split("\n\n")):
        (tmp_path / "corpus" / f"{number}.txt").write_text(part)
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    [train] = blocks("bash", "Train on your own text")
    [python] = blocks("python", "From Python")
    [settings] = blocks("bash", "Settings")
    printed = run(["bash", "-euc", train], tmp_path)
    assert re.search(r"exports/mine on data/mine: [\d.]+ bits/byte", printed)
    assert re.search(r" [\d.]+\n$", run([sys.executable, "-c", python], tmp_path))
    assert "6@2" in run(["bash", "-euc", settings], tmp_path)
