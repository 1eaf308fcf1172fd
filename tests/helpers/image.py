"""A Dockerfile, read and carried out without an engine: its RUN steps in a root of debootstrap.

The base image is that root, whatever FROM says, with the package index and certificates of this
machine's pip. Needs root, debootstrap and a Debian mirror.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

MOUNT = 'mount -t proc proc "$1/proc"; mount --rbind /dev "$1/dev"; '
ENTER = 'exec chroot "$1" setpriv --reuid "$2" --regid "$2" --clear-groups "${@:3}"'


def instructions(text: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile: (word, the rest), lines put together."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    whole = re.sub(r"\\\n\s*", "", "\n".join(lines))
    found = []
    for line in whole.splitlines():
        if line.strip():
            word, _, rest = line.strip().partition(" ")
            found.append((word.upper(), rest.strip()))
    return found


def is_sent(path: str, rules: Sequence[str]) -> bool:
    """Whether .dockerignore lets a path of the context through: the last rule that fits counts, for
    everything below what it names."""
    sent = True
    parts = path.split("/")
    above = ["/".join(parts[: count + 1]) for count in range(len(parts))]
    for rule in rules:
        pattern = rule.removeprefix("!").removeprefix("**/")
        places = parts if "**/" in rule else above
        if any(fnmatch.fnmatchcase(place, pattern) for place in places):
            sent = rule.startswith("!")
    return sent


def context(folder: Path) -> list[str]:
    """The files that a build is given."""
    lines = (folder / ".dockerignore").read_text().splitlines()
    rules = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    listed = subprocess.run(
        ["git", "-C", str(folder), "ls-files", "-co", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=True,
    )
    return [path for path in listed.stdout.splitlines() if is_sent(path, rules)]


def debootstrap(root: Path) -> None:
    """A minimal Debian."""
    command = ["debootstrap", "--variant=minbase", "bookworm", str(root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr


@dataclass
class Image:
    """A root folder, and what a container in it would be given."""

    root: Path
    source: Path
    environment: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    user: int = 0
    entrypoint: list[str] = field(default_factory=list)
    healthcheck: list[str] = field(default_factory=list)

    def build(self, arguments: Mapping[str, str]) -> None:
        """Carry out every instruction; ``arguments`` are those of --build-arg."""
        given: dict[str, str] = {}
        for word, rest in instructions((self.source / "launch/Dockerfile").read_text()):
            if word == "ARG":
                name, _, default = rest.partition("=")
                given[name] = arguments.get(name, default)
            elif word == "ENV":
                for name, value in re.findall(r"(\w+)=(\S*)", rest):
                    value = re.sub(r"\$\{(\w+)\}", lambda m: given.get(m[1], ""), value)
                    self.environment[name] = value
            elif word == "WORKDIR":
                self.workdir = rest
                (self.root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
            elif word == "COPY":
                self._copy(rest)
            elif word == "RUN":
                done = self.run(["sh", "-c", rest], machine_pip() | given, timeout=1500)
                assert done.returncode == 0, f"{rest}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
            elif word == "USER":
                self.user = int(rest)
            elif word == "ENTRYPOINT":
                self.entrypoint = json.loads(rest)
            elif word == "HEALTHCHECK":
                self.healthcheck = json.loads(rest.partition("CMD ")[2])
            else:
                assert word == "FROM", word

    def _copy(self, rest: str) -> None:
        options = [part for part in rest.split() if part.startswith("--")]
        *names, target = [part for part in rest.split() if not part.startswith("--")]
        assert options in ([], ["--chmod=755"])
        place = self.root / self.workdir.lstrip("/") / target
        for path in context(self.source):
            for name in names:
                if name == "." or path == name:
                    to = place / (path if name == "." else Path(path).name)
                    to.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(self.source / path, to)
                    to.chmod(0o755 if options else 0o644)

    def run(
        self, command: Sequence[str], extra: Mapping[str, str] | None = None, timeout: float = 600
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as in a container of the image."""
        shutil.copyfile("/etc/resolv.conf", self.root / "etc/resolv.conf")
        (self.root / "etc/hosts").write_text(f"127.0.0.1 localhost {socket.gethostname()}\n")
        given = dict(extra or {})
        script = MOUNT + "".join(f'mount --rbind {p} "$1{p}"; ' for p in self._lend(given))
        inside = ["bash", "-c", f'cd {self.workdir} && exec "$@"', "bash", *command]
        return subprocess.run(
            [
                *("unshare", "--mount", "--pid", "--fork", "--kill-child", "bash", "-ec"),
                *(script + ENTER, "bash", str(self.root), str(self.user), *inside),
            ],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            env={"PATH": os.environ["PATH"]} | self.environment | given,
        )

    def _lend(self, variables: dict[str, str]) -> list[str]:
        """The folders of this machine that variables name, made to be there; a file that they name
        is copied, and named anew."""
        found = set()
        for name, value in variables.items():
            for word in value.split() if name.startswith("PIP_") else ():
                path = Path(word.removeprefix("file://"))
                if path.is_absolute() and path.is_file():
                    variables[name] = f"/{path.name}.lent"
                    shutil.copyfile(path, self.root / f"{path.name}.lent")
                elif path.is_absolute() and path.exists():
                    (self.root / str(path).lstrip("/")).mkdir(parents=True, exist_ok=True)
                    found.add(str(path))
        return sorted(found)


def machine_pip() -> dict[str, str]:
    """The settings of this machine's pip, as variables, without its constraints."""
    listed = subprocess.run(
        ["python", "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    )
    found = {}
    for line in listed.stdout.splitlines():
        name, _, value = line.partition("=")
        key = name.rpartition(".")[2].replace("-", "_").upper()
        if key in ("CERT", "EXTRA_INDEX_URL", "FIND_LINKS", "INDEX_URL"):
            found[f"PIP_{key}"] = value.strip("'")
    return found
