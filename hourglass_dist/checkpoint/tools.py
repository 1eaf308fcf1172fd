"""Management of checkpoints: ``hourglass checkpoint list``, ``verify`` and ``delete``."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from hourglass_dist.checkpoint.save import complete, latest, read_manifest, remove, tag, verify
from hourglass_dist.core.text import show_bytes


def saved_in(run: Path) -> Path:
    """Return the folder of a run's checkpoints. Raises ValueError when ``run`` has none."""
    folder = run / "checkpoints"
    if not (run / "config.yaml").exists():
        raise ValueError(f"{run}: expected a run folder (with config.yaml), found none")
    if not complete(folder):
        raise ValueError(f"{folder}: no checkpoint has been saved yet")
    return folder


def listing(run: Path) -> Iterator[str]:
    """Yield a header and a line for each checkpoint, oldest first."""
    folder = saved_in(run)
    newest = latest(folder)
    yield f"{'step':>10}  {'written':<16}  {'size':>10}  ranks  ZeRO  held out"
    for path in complete(folder):
        try:
            manifest = read_manifest(path)
        except ValueError as error:
            yield str(error)
            continue
        progress, files = manifest["progress"], manifest["files"]
        written = time.localtime((path / "manifest.json").stat().st_mtime)
        score = progress.get("score")
        yield (
            f"{progress['step']:>10}  {time.strftime('%Y-%m-%d %H:%M', written)}  "
            f"{show_bytes(sum(file['bytes'] for file in files.values())):>10}  {len(files):>5}  "
            f"{progress['stage']:>4}  {f'{score:.4f} bits/byte' if score else '-'}"
            f"{'  (latest)' if path == newest else ''}"
        )


def check(run: Path, step: int | None = None) -> Iterator[str]:
    """Verify every byte of all checkpoints, or of that of ``step``, and yield a line for each.

    Raises ValueError at the end, with the number of damaged checkpoints, if there are any.
    """
    folder = saved_in(run)
    bad = 0
    paths = complete(folder) if step is None else [folder / tag(step)]
    for path in paths:
        try:
            verify(path)
            yield f"{path}: whole"
        except ValueError as error:
            bad += 1
            yield str(error)
    if bad:
        raise ValueError(f"{run}: {bad} of {len(paths)} checkpoints are damaged")


def delete(run: Path, steps: Sequence[int]) -> Iterator[str]:
    """Remove the checkpoints of ``steps`` and yield a line for each.

    Raises ValueError, and removes nothing, when one does not exist or is the newest: the run would
    go back to an older one.
    """
    folder = saved_in(run)
    newest = latest(folder)
    for step in steps:
        path = folder / tag(step)
        if not path.exists():
            known = ", ".join(str(int(each.name[5:])) for each in complete(folder))
            raise ValueError(f"{path}: no such checkpoint; there are {known}")
        if path == newest:
            raise ValueError(f"{path}: is the newest, from which the run resumes: it stays")
    for step in steps:
        remove(folder / tag(step))
        yield f"{folder / tag(step)}: removed"
