"""Hostfiles in the format of DeepSpeed and MPI: a line ``HOST slots=RANKS`` for each node."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple


class Hostfile(NamedTuple):
    """The contents of a hostfile."""

    hosts: list[str]
    slots: int
    """Number of ranks on each host."""


def read_hostfile(path: Path) -> Hostfile:
    """Read a hostfile. Raises ValueError for the first line that is wrong."""
    found: dict[str, int] = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        words, where = line.partition("#")[0].strip(), f"{path}, line {number}"
        if not words:
            continue
        match = re.fullmatch(r"([\w.:@-]+)\s+slots=(\d+)", words)
        if not match or match[1].startswith("-"):
            raise ValueError(f"{where}: expected 'HOST slots=RANKS', given {words!r}")
        host, slots = match[1], int(match[2])
        if host in found:
            raise ValueError(f"{where}: {host} is there twice")
        if slots == 0:
            raise ValueError(f"{where}: {host}: expected at least one slot, given 0")
        first = next(iter(found), host)
        if slots != found.get(first, slots):
            raise ValueError(
                f"{where}: {host} has {slots} slots and {first} has {found[first]}; all nodes "
                "need equally many"
            )
        found[host] = slots
    if not found:
        raise ValueError(f"{path}: no hosts; expected a line 'HOST slots=RANKS' for each node")
    return Hostfile(list(found), next(iter(found.values())))
