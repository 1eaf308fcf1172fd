"""What imports what in this project, and how long things are: read from the source, not run."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

PACKAGES = ("hourglass_dist", "data_tools")
TRUSTED = ("config", "core", "data", "model", "engine", "checkpoint", "train.py")
"""Rooms to read before one trusts a run."""


class Module(NamedTuple):
    """A source file."""

    path: Path
    tree: ast.Module
    lines: int


class Graph:
    """The modules below a folder that holds ``PACKAGES``, and their imports of one another."""

    def __init__(self, root: Path) -> None:
        self.root, self.modules = root, dict[str, Module]()
        for path in sorted(p for package in PACKAGES for p in (root / package).rglob("*.py")):
            text = path.read_text()
            name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
            self.modules[name] = Module(path, ast.parse(text, str(path)), len(text.splitlines()))

    def imports(self, name: str) -> set[str]:
        """The modules of this project that a module imports."""
        return set(self.modules) & {
            other if other in self.modules else other.rpartition(".")[0]
            for other in imported(self.modules[name].tree)
        }

    def modules_of(self, room: str) -> list[str]:
        return [name for name in self.modules if room_of(name) == room]

    def rooms(self) -> dict[str, set[str]]:
        """Every room, and the rooms that it imports."""
        rooms: dict[str, set[str]] = defaultdict(set)
        for name in self.modules:
            here = room_of(name)
            rooms[here] |= {room_of(other) for other in self.imports(name)} - {here}
        return dict(rooms)

    def lines(self, rooms: Iterable[str]) -> int:
        """Lines of all files of these rooms, which are folders or files of hourglass_dist."""
        folders = [self.root / "hourglass_dist" / room for room in rooms]
        return sum(
            module.lines
            for module in self.modules.values()
            if any(module.path == folder or folder in module.path.parents for folder in folders)
        )

    def files_by_folder(self) -> dict[str, int]:
        """The number of source files in each folder."""
        count: dict[str, int] = defaultdict(int)
        for module in self.modules.values():
            count[str(module.path.parent.relative_to(self.root))] += 1
        return dict(count)

    def functions(self) -> Iterator[tuple[int, str]]:
        """The lines of every function, and its name."""
        for name, module in self.modules.items():
            for node in ast.walk(module.tree):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    assert node.end_lineno is not None
                    yield node.end_lineno - node.lineno + 1, f"{name}.{node.name}"


def room_of(name: str) -> str:
    """``config`` for ``hourglass_dist.config.loader``; data_tools is one room, the Python API of
    ``hourglass_dist/__init__.py`` another."""
    package, *rest = name.split(".")
    return rest[0] if package == "hourglass_dist" and rest else package


def imported(tree: ast.Module) -> Iterator[str]:
    """All names imported, also inside functions: of ``from a import b``, a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def depth(graph: dict[str, set[str]]) -> int:
    """How many layers a graph without cycles has: the longest way through it."""

    @cache
    def below(name: str) -> int:
        return 1 + max((below(other) for other in graph[name]), default=0)

    return max(below(name) for name in graph)


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The sets of names that import one another in a circle."""

    def reach(start: str) -> set[str]:
        seen, todo = set[str](), [start]
        while todo:
            new = graph[todo.pop()] - seen
            seen |= new
            todo += new
        return seen

    ways = {name: reach(name) for name in graph}
    circles = {
        frozenset(other for other in ways[name] if name in ways[other])
        for name in graph
        if name in ways[name]
    }
    return sorted(sorted(circle) for circle in circles)
