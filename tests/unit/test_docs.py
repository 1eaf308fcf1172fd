"""What the README and the settings files tell people to type exists."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
from paths import ROOT

from hourglass_dist.cli import app

README = (ROOT / "README.md").read_text()
TEXTS = [ROOT / "README.md", ROOT / "launch/quickstart.sh", *sorted(ROOT.glob("configs/*.yaml"))]


def test_the_picture_is_the_one_that_its_script_draws(tmp_path: Path) -> None:
    script = tmp_path / "draw_hourglass.py"
    script.write_text((ROOT / "docs/draw_hourglass.py").read_text())
    subprocess.run([sys.executable, script], check=True, capture_output=True)
    assert (tmp_path / "hourglass.svg").read_text() == (ROOT / "docs/hourglass.svg").read_text()


DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def anchors(text: str) -> set[str]:
    """The names that a page's headings get: lower case, no punctuation, hyphens for spaces."""
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if "://" not in link:
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target.read_text()), link


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.name)
def test_lines_are_not_long(page: Path) -> None:
    """Tables, pictures and what programs print aside."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    lines = [line for line in text.splitlines() if not line.startswith(("|", "!", "    "))]
    assert not [line for line in lines if len(line) > 120 and " " in line[:120].strip()]


def test_no_merge_is_half_done() -> None:
    written = (".md", ".py", ".yaml", ".toml", ".sh", ".txt", ".sbatch")
    folders = ("docs", "configs", "launch", "tests", "hourglass_dist", "data_tools")
    files = [*ROOT.glob("*.*"), *(p for folder in folders for p in (ROOT / folder).rglob("*.*"))]
    for path in files:
        if path.suffix in written:
            marked = re.search(r"^(<{7}|>{7})( |$)", path.read_text(), flags=re.MULTILINE)
            assert not marked, path


def commands(text: str) -> list[str]:
    """The lines of a text that call ``hourglass``, without comments."""
    found = re.findall(r"^[#\s]*(hourglass (?!language|LM).*)$", text, flags=re.MULTILINE)
    return [line.split("   ")[0] for line in found]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_commands_and_options_exist(path: Path) -> None:
    for line in commands(path.read_text()):
        words = shlex.split(line)[1:]
        command = typer.main.get_command(app)
        while isinstance(inner := getattr(command, "commands", None), dict):
            assert words[0] in inner, line
            command = inner[words.pop(0)]
        known = {name for parameter in command.params for name in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, line


def test_the_readme_shows_commands() -> None:
    assert len(commands(README)) >= 4
