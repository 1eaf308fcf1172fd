"""Quick checks that all ranks of a run agree, usually in well below a second.

    versions, code, settings   the same on all ranks, before anything is written
    run folder                 the same folder on all hosts, with space for a checkpoint

Every check is called by all ranks and returns the same list on all of them: one line for each
mismatch, with ranks and hosts. ``preflight`` checks more.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import secrets
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from hourglass_dist.config.loader import differences, parse
from hourglass_dist.config.schema import Config
from hourglass_dist.core import ranks
from hourglass_dist.core.files import replace
from hourglass_dist.core.text import show_bytes
from hourglass_dist.health.history import about_this_code

SHARED_SECONDS = 10.0
"""Time in which other hosts must see a new file, seconds; over NFS some seconds are usual."""


def require_same_start(config: Config, world: ranks.World) -> None:
    """Raise ValueError, on all ranks, when settings, packages or code differ between ranks."""
    if world.size > 1:
        hosts = hosts_of(world)
        _refuse([*other_code(world, hosts), *other_settings(config, world, hosts)])


def require_good_folder(config: Config, world: ranks.World, checkpoint_bytes: int) -> None:
    """Raise ValueError, on all ranks, when the run folder is not shared by all hosts, or has no
    space for one checkpoint."""
    if world.size > 1:
        _refuse(not_shared(Path(config.run.dir), world, hosts_of(world)))
        _refuse(no_room(config, world, 1, checkpoint_bytes))


def require_compiler(config: Config, device: torch.device) -> None:
    """Raise ValueError when ``train.compile`` is set on a CPU without a C++ compiler."""
    compiler = os.environ.get("CXX", "g++")
    if config.train.compile and device.type == "cpu" and not shutil.which(compiler):
        raise ValueError(
            f"train.compile: needs a C++ compiler on a CPU, {compiler} is not there "
            "(Debian, Ubuntu: apt-get install g++)"
        )


def _refuse(lines: Sequence[str]) -> None:
    if lines:
        raise ValueError("\n".join(lines))


def hosts_of(world: ranks.World) -> list[str]:
    """Return the host name of every rank."""
    return ranks.gather_texts(platform.node(), world.device)


def who(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Return the first ranks and hosts, such as ``ranks 2, 3 (node1) and 4, 5 (node2)``."""
    by_host: dict[str, list[str]] = {}
    for rank in ranks:
        by_host.setdefault(hosts[rank], []).append(str(rank))
    shown = [
        f"{', '.join(some[:8])}{', ...' if len(some) > 8 else ''} ({host})"
        for host, some in list(by_host.items())[:4]
    ]
    more = len(by_host) - len(shown)
    return (
        f"rank{'s' if len(ranks) > 1 else ''} {' and '.join(shown)}"
        f"{f' and those of {more} more hosts' if more else ''}"
    )


def mismatches(name: str, values: Sequence[str | None], hosts: Sequence[str]) -> list[str]:
    """Return one line when the ``values`` of the ranks differ; None (unknown) is ignored."""
    known = [value for value in values if value is not None]
    if len(set(known)) < 2:
        return []
    most = max(dict.fromkeys(known), key=known.count)  # of equally frequent ones the first
    others = {v: [r for r, mine in enumerate(values) if mine == v] for v in known if v != most}
    theirs = "; ".join(f"{value} on {who(ranks, hosts)}" for value, ranks in others.items())
    ours = who([rank for rank, value in enumerate(values) if value == most][:1], hosts)
    return [f"ranks disagree: {name}: {most} on {ours}, {theirs}"]


def other_code(world: ranks.World, hosts: Sequence[str]) -> list[str]:
    """Return mismatches of package versions, commit and source files between ranks."""
    mine = code()
    everyone = [json.loads(text) for text in ranks.gather_texts(json.dumps(mine), world.device)]
    lines = []
    for name in mine:
        lines += mismatches(name, [of_rank[name] for of_rank in everyone], hosts)
    return lines


def code() -> Mapping[str, str | None]:
    """Return package versions, commit and a hash of the source files of this process."""
    about, here = about_this_code(), Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(here.rglob("*.py")):
        digest.update(f"{path.relative_to(here)}\0".encode() + path.read_bytes())
    packages = {"Python": platform.python_version(), **about["versions"]}
    return packages | {"commit": about["revision"], "hourglass_dist/*.py": digest.hexdigest()[:12]}


def other_settings(config: Config, world: ranks.World, hosts: Sequence[str]) -> list[str]:
    """Return mismatches between the settings of rank 0 and those of other ranks."""
    mine = config.model_dump_json()
    hashes = [each for (each,) in ranks.gather_ints([ranks.hash_int(mine)], world.device)]
    if len(set(hashes)) == 1:
        return []
    theirs, *_ = ranks.gather_texts(mine if world.is_main else "", world.device)
    changed = differences(parse(Config, json.loads(theirs), source="rank 0"), config)
    told = ranks.gather_texts("; ".join(changed[:3]), world.device)
    lines = []
    for text in dict.fromkeys(text for text in told if text):
        other_ranks = [rank for rank, other in enumerate(told) if other == text]
        lines.append(
            f"ranks disagree: the settings of {who(other_ranks, hosts)} are not those of "
            f"{who([0], hosts)}: {text}"
        )
    return lines


def not_shared(folder: Path, world: ranks.World, hosts: Sequence[str]) -> list[str]:
    """Return a line when a file that rank 0 writes to ``folder`` is not visible on all hosts."""
    token = f".seen_by_all_{secrets.token_hex(8)}"
    token = ranks.gather_texts(token if world.is_main else "", world.device)[0]
    problem = ""
    if world.is_main:
        try:
            replace(folder / token, hosts[0])
        except OSError as error:
            problem = f"{folder}: cannot be written on {who([0], hosts)}: {error.strerror}"
    if problem := ranks.gather_texts(problem, world.device)[0]:
        return [problem]
    ends = time.monotonic() + SHARED_SECONDS
    while not (seen := (folder / token).exists()) and time.monotonic() < ends:
        with suppress(OSError):
            next(folder.iterdir(), None)  # makes NFS look again
        time.sleep(0.1)
    everyone = [each for (each,) in ranks.gather_ints([seen], world.device)]
    if world.is_main:
        (folder / token).unlink(missing_ok=True)
    blind = [rank for rank, sees in enumerate(everyone) if not sees]
    if not blind:
        return []
    return [
        f"{folder}: is not shared: {who(blind, hosts)} cannot see what {who([0], hosts)} writes "
        "there; run.dir must be on a file system that all nodes mount at the same place"
    ]


def kept(config: Config) -> int:
    """Return how many checkpoints a run keeps at its end, plus one that is being written."""
    settings = config.checkpoint
    for_good = config.train.steps // settings.keep_every if settings.keep_every else 0
    return settings.keep + settings.keep_best + for_good + 1


def free_bytes(folder: Path) -> int:
    """Return the free bytes of the file system of a folder that exists or will be made."""
    folder = folder.absolute()
    return shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free


def no_room(
    config: Config, world: ranks.World, checkpoints: int, checkpoint_bytes: int
) -> list[str]:
    """Return a line when the run folder has no space for ``checkpoints`` more checkpoints."""

    def look() -> str:
        if not world.is_main:
            return ""
        free, need = free_bytes(Path(config.run.dir)), checkpoints * checkpoint_bytes
        if free >= need:
            return ""
        return (
            f"{config.run.dir}: the disk is full: {show_bytes(free)} are free, {show_bytes(need)} "
            f"needed for {checkpoints} checkpoint{'s' if checkpoints > 1 else ''}"
        )

    line = ranks.gather_texts(ranks.raise_on_all_ranks(look, world.device), world.device)[0]
    return [line] if line else []
