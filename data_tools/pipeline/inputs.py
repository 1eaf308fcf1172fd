"""The files that a pipeline reads, and their division into tasks.

The division depends on the files and on ``task_bytes`` alone, never on the number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pydantic import NonNegativeInt

from data_tools.pipeline.settings import Prepare
from data_tools.pipeline.workspace import Spec
from data_tools.sources.readers import ALL_SUFFIXES, can_be_cut
from data_tools.sources.text_files import find_inputs
from hourglass_dist.config.loader import Section
from hourglass_dist.data.tokenizer import load_tokenizer

UNPACKED = {".gz": 4, ".zst": 4, ".parquet": 3}
"""Approximate bytes of text in a byte of a file with this ending."""


class InputFile(Section):
    """The state of an input file when the pipeline was started."""

    path: str
    """Absolute path of the file."""
    bytes: NonNegativeInt
    """Size of the file, bytes."""
    modified_ns: int
    """Modification time of the file, nanoseconds since the epoch."""

    @classmethod
    def look(cls, path: Path) -> InputFile:
        """Return the present state of a file."""
        about = path.stat()
        return cls(path=str(path), bytes=about.st_size, modified_ns=about.st_mtime_ns)

    def require_unchanged(self) -> None:
        """Raise ValueError when the file is gone or has changed."""
        path = Path(self.path)
        if not path.exists():
            raise ValueError(f"{path}: has been removed since this was begun")
        if (now := InputFile.look(path)) != self:
            raise ValueError(
                f"{path}: changed since this was begun: {self.bytes:,} bytes then, "
                f"{now.bytes:,} bytes now"
            )

    @property
    def text_bytes(self) -> int:
        """Approximate size of the file's text, bytes."""
        return self.bytes * UNPACKED.get(Path(self.path).suffix.lower(), 1)


class Inputs(Section):
    """The inputs of a pipeline."""

    files: dict[str, list[InputFile]]
    """Input files of every source, in order."""
    tokenizer: str
    """sha256 of the model in ``tokenizer.folder``; empty without a folder."""


def find(settings: Prepare) -> Inputs:
    """Return all inputs. Raises ValueError when one is missing or of an unknown kind."""
    files = {}
    for source in settings.sources:
        suffixes = tuple(suffix.lower() for suffix in source.suffixes) or ALL_SUFFIXES
        paths = find_inputs([Path(path) for path in source.inputs], suffixes)
        files[source.name] = [InputFile.look(path.absolute()) for path in paths]
    model = ""
    if settings.tokenizer.folder:
        model = load_tokenizer(Path(settings.tokenizer.folder)).fingerprint.model_sha256
    return Inputs(files=files, tokenizer=model)


def changes(old: Inputs, new: Inputs) -> list[str]:
    """Return the differences between two inputs, a phrase for every file."""
    found = []
    for source in dict.fromkeys([*old.files, *new.files]):
        before = {file.path: file for file in old.files.get(source, [])}
        after = {file.path: file for file in new.files.get(source, [])}
        found += [f"new input {path}" for path in after if path not in before]
        found += [f"input {path} is gone" for path in before if path not in after]
        for path, file in after.items():
            if path in before and before[path] != file:
                sizes = f"{before[path].bytes:,} -> {file.bytes:,} bytes"
                found.append(
                    f"input {path} changed ({sizes})"
                    if before[path].bytes != file.bytes
                    else f"input {path} was written again"
                )
    if old.tokenizer != new.tokenizer:
        found.append("another tokenizer in tokenizer.folder")
    return found


def read_tasks(settings: Prepare, inputs: Inputs) -> list[Spec]:
    """Return the read tasks; a part is [number of the file in its source, file, begin, end]."""
    tasks = []
    for source in settings.sources:
        parts: list[list[object]] = []
        size = 0
        for number, file in enumerate(inputs.files[source.name]):
            for begin, end in _ranges(file, settings.task_bytes):
                parts.append([number, file.model_dump(), begin, end])
                size += (end if end is not None else file.text_bytes) - begin
                if size >= settings.task_bytes:
                    tasks.append({"source": source.name, "parts": parts})
                    parts, size = [], 0
        if parts:
            tasks.append({"source": source.name, "parts": parts})
    return tasks


def _ranges(file: InputFile, task_bytes: int) -> Iterator[tuple[int, int | None]]:
    """Yield byte ranges of about ``task_bytes``, or (0, None) for a file that is read whole."""
    if not can_be_cut(Path(file.path)) or file.bytes <= task_bytes:
        yield 0, None
        return
    begins = range(0, file.bytes, task_bytes)
    for begin in begins:
        yield begin, min(begin + task_bytes, file.bytes)
