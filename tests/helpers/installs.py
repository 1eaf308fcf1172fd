"""The package as users have it: a wheel, an editable install or a plain checkout, in an environment
with its core dependencies and nothing else. Nothing is downloaded: dependencies are links."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from paths import ROOT

PARTS = ("configs", "data_tools", "hourglass_dist", "launch")
FILES = ("LICENSE", "README.md", "pyproject.toml")


def checkout(folder: Path) -> Path:
    """A copy of what is built: building leaves files beside the sources."""
    for part in PARTS:
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    return folder


def closure(requirements: Iterable[str]) -> list[Distribution]:
    """What these requirements install, what those need included."""
    waiting = [Requirement(text) for text in requirements]
    seen: dict[str, Distribution] = {}
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name not in seen:
            seen[name] = distribution(requirement.name)
            needs = map(Requirement, seen[name].requires or ())
            waiting += [n for n in needs if n.marker is None or n.marker.evaluate({"extra": ""})]
    return list(seen.values())


def environment(folder: Path, requirements: Iterable[str]) -> Path:
    """A virtual environment with links to what ``requirements`` install, and without pip."""
    links, env = folder / "links", folder / "env"
    links.mkdir(parents=True)
    for package in closure([*requirements, "setuptools"]):
        for top in {file.parts[0] for file in package.files or ()} - {"..", "__pycache__"}:
            if not (links / top).exists():
                (links / top).symlink_to(str(package.locate_file(top)))
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", env], check=True)
    [site] = env.glob("lib/python*/site-packages")
    (site / "links.pth").write_text(f"{links}\n")
    return env


class Install:
    """One way to have the package."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.source = checkout(folder / "source")
        project = tomllib.loads((self.source / "pyproject.toml").read_text())["project"]
        self.env = environment(folder, project["dependencies"])
        self.empty = folder / "empty"
        self.empty.mkdir()
        self.command = [str(self.env / "bin/hourglass")]
        self.variables = {"PATH": os.defpath, "HOME": str(folder), "OMP_NUM_THREADS": "1"}
        if kind == "checkout":
            self.command = [str(self.env / "bin/python"), "-m", "hourglass_dist.cli"]
            self.variables["PYTHONPATH"] = str(self.source)
            self.variables["VIRTUAL_ENV"] = str(self.env)
        elif kind == "editable":
            self._pip("install", "--no-build-isolation", "--editable", self.source)
            self.variables["VIRTUAL_ENV"] = str(self.env)
        else:
            wheels = folder / "wheels"
            self._pip("wheel", "--no-build-isolation", "--wheel-dir", wheels, self.source)
            shutil.rmtree(self.source)
            self._pip("install", "--no-index", *wheels.iterdir())

    def _pip(self, verb: str, *arguments: object) -> None:
        words = [sys.executable, "-m", "pip", "--quiet", "--python", self.env / "bin/python", verb]
        subprocess.run([*map(str, words), "--no-deps", *map(str, arguments)], check=True)

    def run(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        """Any command, in a folder with nothing of the project in it."""
        return subprocess.run(
            command,
            cwd=self.empty,
            env=self.variables,
            capture_output=True,
            text=True,
            timeout=500,
            stdin=subprocess.DEVNULL,
        )

    def hourglass(self, *arguments: object) -> str:
        """What the command prints; it must succeed."""
        done = self.run([*self.command, *map(str, arguments)])
        assert done.returncode == 0, f"{arguments}:\n{done.stdout}\n{done.stderr[-3000:]}"
        return done.stdout
