"""Figures of the architecture: how many files, rooms and layers, how long things are.

    python -m tests.measure.house [FOLDER [ROOM ...]]

FOLDER is a checkout of this project, this one if not given. ROOMs are folders and files of its
``hourglass_dist`` that one reads before one trusts a run.
"""

from __future__ import annotations

import sys
from pathlib import Path

from house import TRUSTED, Graph, cycles, depth
from paths import ROOT


def main(folder: Path, trusted: list[str]) -> None:
    """Print them."""
    house = Graph(folder)
    modules = {name: house.imports(name) for name in house.modules}
    rooms, folders = house.rooms(), house.files_by_folder()
    fullest = max(folders, key=lambda name: folders[name])
    longest = max(house.modules, key=lambda name: house.modules[name].lines)
    function = max(house.functions())
    circles = cycles(rooms)
    figures = {
        "files": len(house.modules),
        "rooms": len(rooms),
        "imports between rooms": sum(map(len, rooms.values())),
        "layers of rooms": f"not to be said: {circles} import one another"
        if circles
        else depth(rooms),
        "cycles of modules": len(cycles(modules)),
        "files in the fullest folder": f"{folders[fullest]} ({fullest})",
        "lines to trust a run": house.lines(trusted),
        "lines that ship": sum(module.lines for module in house.modules.values()),
        "longest file": f"{house.modules[longest].lines} ({longest})",
        "longest function": f"{function[0]} ({function[1]})",
    }
    for name, figure in figures.items():
        print(f"{name:28} {figure}")


if __name__ == "__main__":
    given = sys.argv[1:]
    main(Path(given[0]) if given else ROOT, given[1:] or list(TRUSTED))
