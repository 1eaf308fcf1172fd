"""Saving and finding the checkpoints of a run.

    RUN/checkpoints/
        step_00000500/    rank_00000.safetensors ... and manifest.json: the progress, and size and
                          crc32c of each file
        latest            the name of the newest one

A checkpoint is written under a temporary name, synced, renamed, and only then named by ``latest``:
a process killed at any instant leaves the previous one in place and unharmed. So does a full disk:
the failed save is reported and training continues.
"""

from __future__ import annotations

import json
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

import google_crc32c

from hourglass_dist.checkpoint.remote import RemoteCopies
from hourglass_dist.config.schema import CheckpointConfig
from hourglass_dist.core import ranks
from hourglass_dist.core.files import checksum, replace, sync
from hourglass_dist.engine import sharded_state
from hourglass_dist.engine.sharded_state import Snapshot

FORMAT = 1


@dataclass(frozen=True)
class TrainingProgress:
    """Progress of a run; with weights, optimizer state and loss scale, the whole training state."""

    step: int
    """Number of completed optimizer steps."""
    data: dict[str, Any]
    """Position in the data, from ``Stream.state``: rows consumed by completed steps, and the plan's
    hash."""
    tokenizer: dict[str, str]
    """Fingerprint of the tokenizer."""
    stage: int
    """ZeRO stage that wrote the state (information only; any stage can read it)."""
    score: float | None = None
    """Held-out bits per byte after this step; None where it was not measured."""
    guard: dict[str, Any] = field(default_factory=dict)
    """State of ``LossSpikes``."""


class Checkpoints:
    """The checkpoints of a run. All ranks call all methods together.

    Training waits only while the state is copied: a thread of each rank writes that rank's file and
    reports to the main rank through the process group's store; the main rank's thread completes the
    checkpoint when all have reported. No thread joins a collective. Only one save runs at a time.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        world: ranks.World,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        """Set up; ``about``, the code and settings of the run, goes into every manifest."""
        self.folder = folder
        self._about = dict(about or {})
        self.passed_over: list[str] = []
        """Errors of the checkpoints that ``newest`` passed over, one line each."""
        self._config = config
        self._world = world
        self._attempts = 0
        self._ranks = range(world.size)
        self._remote = RemoteCopies(config.remote) if config.remote else None
        self._session = ranks.gather_ints([secrets.randbits(40)], world.device)[0][0]
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._news: list[str] = []
        if world.is_main:
            remove_unfinished(folder)

    def save(self, take: Callable[[], Snapshot], progress: TrainingProgress) -> None:
        """Start a save, after waiting for the previous one: ``take()`` copies this rank's state, a
        thread writes it."""
        self.wait()
        name = f"{tag(progress.step)}_{self._session:010x}_{self._attempts}"
        self._attempts += 1
        snapshot = take()
        work = partial(self._write, self.folder / f".unfinished_{name}", snapshot, progress)
        self._thread = threading.Thread(target=work, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until the running save has ended, whether or not it succeeded."""
        if self._thread:
            self._thread.join()
            self._thread = None

    def finish(self) -> None:
        """Wait for the last save. Raises ValueError, on all ranks, when it failed."""
        self.wait()

        def check() -> None:
            if self._error:
                raise self._error

        ranks.raise_on_all_ranks(check, self._world.device)

    def news(self) -> list[str]:
        """Return lines about saves ended since the last call (a failed save: on every rank)."""
        news, self._news = self._news, []
        return news

    def _write(self, folder: Path, snapshot: Snapshot, progress: TrainingProgress) -> None:
        """Write this rank's file, on the main rank also the rest; it runs in the thread."""
        begun = time.perf_counter()
        file = folder / sharded_state.file_name(self._world.rank)
        self._error = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            snapshot.write(file)
            entry: dict[str, Any] = {"bytes": file.stat().st_size, "crc32c": checksum(file)}
        except Exception as error:  # of any kind: the main rank must be told
            self._error = error
            entry = {"error": str(error)}
        try:
            with ExitStack() as stack:
                my_file = None if self._error else stack.enter_context(file.open("rb"))
                ranks.put_note(f"{folder.name}/{self._world.rank}", json.dumps(entry))
                if self._world.is_main:
                    target = self._complete(folder, progress)
                    seconds = time.perf_counter() - begun
                    self._news.append(f"step {progress.step}: saved {target} ({seconds:.1f} s)")
                if self._remote and my_file:
                    self._copy(self._remote, my_file, folder.name, progress)
        except (OSError, ValueError, RuntimeError) as error:
            self._error = error
            shutil.rmtree(folder, ignore_errors=True)
            self._news.append(f"step {progress.step}: could not be saved: {error}")

    def _copy(
        self, remote: RemoteCopies, my_file: IO[bytes], attempt: str, progress: TrainingProgress
    ) -> None:
        """Copy this rank's file to the remote folder; the main rank completes the copy."""
        name, problem = tag(progress.step), ""
        try:
            remote.put(f"{name}/{sharded_state.file_name(self._world.rank)}", my_file)
        except Exception as error:  # of any library: only the copy is lost
            problem = f"rank {self._world.rank}: {error or type(error).__name__}"
        ranks.put_note(f"{attempt}/copy/{self._world.rank}", problem)
        if self._world.is_main:
            notes = ranks.wait_for_notes(f"{attempt}/copy/{rank}" for rank in self._ranks)
            failed = [note for note in notes if note]
            try:
                if not failed:
                    kept = [path.name for path in complete(self.folder)]
                    remote.finish(self.folder / name, kept)
            except Exception as error:
                failed = [str(error) or type(error).__name__]
            result = f"could not be copied: {failed[0]}" if failed else "copied"
            self._news.append(f"step {progress.step}: {remote.url}: {result}")

    def _complete(self, folder: Path, progress: TrainingProgress) -> Path:
        """Write the manifest once every file is there, rename, set ``latest``, remove old ones.

        Raises ValueError when a rank could not write its file.
        """
        notes = ranks.wait_for_notes(f"{folder.name}/{rank}" for rank in self._ranks)
        entries = [json.loads(note) for note in notes]
        for rank, entry in enumerate(entries):
            if "error" in entry:
                raise ValueError(f"rank {rank}: {entry['error']}")
        files = {sharded_state.file_name(rank): entry for rank, entry in enumerate(entries)}
        manifest: dict[str, Any] = {"format": FORMAT, "progress": asdict(progress), "files": files}
        manifest["about"] = self._about
        manifest["crc32c"] = _own_checksum(manifest)
        replace(folder / "manifest.json", json.dumps(manifest, indent=1))
        target = self.folder / tag(progress.step)
        if target.exists():  # left by a run that died before it named this step in ``latest``
            remove(target)
        folder.rename(target)
        sync(self.folder)
        replace(self.folder / "latest", target.name + "\n")
        self._retain(target)
        return target

    def _retain(self, newest: Path) -> None:
        """Remove old checkpoints, and those of later steps than ``newest``, which are abandoned."""
        saved = {path: read_manifest(path)["progress"] for path in complete(self.folder)}
        past = [path for path in saved if path <= newest]
        kept = past[-self._config.keep :]
        if every := self._config.keep_every:
            kept += [path for path in past if saved[path]["step"] % every == 0]
        scored = [path for path in past if saved[path].get("score") is not None]
        if self._config.keep_best and scored:
            kept.append(min(scored, key=lambda path: saved[path]["score"]))
        for path in saved:
            if path not in kept:
                remove(path)

    def newest(self, up_to: int | None = None) -> tuple[Path, TrainingProgress] | None:
        """Return the newest intact checkpoint (of step ``up_to`` or before), verified by all ranks
        together, or None when there is none.

        ``passed_over`` then names the damaged ones: the one that ``latest`` names when it is
        missing or damaged, then older ones. Raises ValueError when none is intact.
        """
        if self._remote and up_to is None:
            self._fetch_newer(self._remote)
        path = latest(self.folder)
        if up_to is not None:
            early = [p for p in complete(self.folder) if p.name <= tag(up_to)]
            path = early[-1] if early else None
        older = [other for other in reversed(complete(self.folder)) if path and other < path]
        names = "\n".join(str(each.name) for each in [path, *older] if each)
        seen = ranks.gather_ints([google_crc32c.value(names.encode())], self._world.device)
        if len(set(map(tuple, seen))) > 1:
            raise ValueError(f"{self.folder}: ranks see different checkpoints: is it shared?")
        if path is None:
            return None
        share = self._world.rank, self._world.size
        self.passed_over = []
        for candidate in [path, *older]:
            try:
                return candidate, ranks.raise_on_all_ranks(
                    partial(verify, candidate, share), self._world.device
                )
            except ValueError as error:
                self.passed_over.append(str(error))
        raise ValueError(f"{self.passed_over[0]}; there is no other good checkpoint")

    def _fetch_newer(self, remote: RemoteCopies) -> None:
        """Copy the newest remote checkpoint to the run folder if it is newer than those there.

        Raises ValueError, on all ranks, when the remote folder cannot be reached: the run would
        otherwise start again from step 0.
        """

        def find() -> int:
            name = remote.latest() if self._world.is_main else None
            here = latest(self.folder)
            return int(name[5:]) if name and (here is None or here.name < name) else -1

        device = self._world.device
        step = ranks.gather_ints([ranks.raise_on_all_ranks(find, device)], device)[0][0]
        if step < 0:
            return
        folder = self.folder / f".unfinished_fetch_{self._session:010x}"

        def fetch() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            for name in remote.files(tag(step))[self._world.rank :: self._world.size]:
                remote.get(f"{tag(step)}/{name}", folder / name)

        ranks.raise_on_all_ranks(fetch, device)
        if self._world.is_main:
            target = self.folder / tag(step)
            if target.exists():
                remove(target)
            folder.rename(target)
            replace(self.folder / "latest", target.name + "\n")
        ranks.barrier()


def tag(step: int) -> str:
    """Return the folder name of a step's checkpoint."""
    return f"step_{step:08d}"


def complete(folder: Path) -> list[Path]:
    """Return the complete checkpoints (those with a manifest), oldest first."""
    return sorted(path for path in folder.glob("step_*") if (path / "manifest.json").exists())


def remove(path: Path) -> None:
    """Remove a checkpoint; if killed meanwhile, it leaves no partly removed checkpoint."""
    gone = path.with_name(f".unfinished_removal_of_{path.name}")
    shutil.rmtree(gone, ignore_errors=True)
    path.rename(gone)
    shutil.rmtree(gone)


def remove_unfinished(folder: Path) -> None:
    """Remove the folders that a killed process left partly written or partly removed."""
    for path in folder.glob(".unfinished_*"):
        shutil.rmtree(path)


def latest(folder: Path) -> Path | None:
    """Return the checkpoint that ``latest`` names; without that file the newest one; None when
    there is none."""
    try:
        return folder / (folder / "latest").read_text().strip()
    except FileNotFoundError:
        saved = complete(folder)
        return saved[-1] if saved else None


def read_manifest(path: Path) -> dict[str, Any]:
    """Return a checkpoint's manifest. Raises ValueError when it is missing, damaged or from a newer
    version."""
    file = path / "manifest.json"
    try:
        manifest: dict[str, Any] = json.loads(file.read_text())
        version, crc = manifest["format"], manifest.pop("crc32c")
        TrainingProgress(**manifest["progress"])
    except FileNotFoundError:
        raise ValueError(f"{path}: no such checkpoint (manifest.json is missing)") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: damaged: {error}") from None
    if version > FORMAT:
        raise ValueError(f"{file}: written by a newer version: format {version}, known {FORMAT}")
    if crc != _own_checksum(manifest):
        raise ValueError(f"{file}: damaged: its content does not fit its own checksum")
    return manifest


def _own_checksum(manifest: dict[str, Any]) -> int:
    """Return the crc32c of a manifest without its checksum."""
    return int(google_crc32c.value(json.dumps(manifest, sort_keys=True).encode()))


def verify(path: Path, share: tuple[int, int] = (0, 1)) -> TrainingProgress:
    """Check size and checksum of a checkpoint's files (``share=(r, n)``: each n-th one from r on).

    Raises ValueError naming the first file that is missing, truncated or altered.
    """
    manifest = read_manifest(path)
    for name, expected in list(manifest["files"].items())[share[0] :: share[1]]:
        file = path / name
        if not file.exists():
            raise ValueError(f"{file}: missing")
        if (size := file.stat().st_size) != expected["bytes"]:
            raise ValueError(f"{file}: expected {expected['bytes']} bytes, found {size}")
        if (crc := checksum(file)) != expected["crc32c"]:
            raise ValueError(f"{file}: expected crc32c {expected['crc32c']:08x}, found {crc:08x}")
    return TrainingProgress(**manifest["progress"])
