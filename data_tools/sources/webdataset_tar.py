"""Text from WebDataset tars of others: nothing in them is trusted, nothing is unpacked.

Every header is checked before any content is read. A whole tar is refused for a member that is no
plain file, whose path leaves the tar's folder, that claims to reach past the end of the file, or
whose name could make a reader run code (pickles). Then webdataset groups members into samples; its
decoders and its ``pipe:`` and other URLs are never used.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from data_tools.sources.text_files import Problem, Records, Wrong, text_or_wrong
from hourglass_dist.config.loader import show

RUNS_CODE = (".pickle", ".pkl", ".pyd", ".pth", ".pt", ".ten", ".npy", ".npz", ".dill", ".joblib")
"""File name endings that webdataset or its usual decoders would unpickle or load as tensors."""


def read_tar(path: Path, text_field: str) -> Records:
    """Yield the documents of a WebDataset tar: KEY.txt, or the field ``text_field`` of KEY.json.

    Raises ValueError for a hostile or damaged tar, and when a sample is at two positions.
    """
    from webdataset.tariterators import group_by_keys

    positions = _checked(path)
    with tarfile.open(path, "r:") as tar:
        members = (
            {"fname": info.name, "data": tar.extractfile(info).read(), "__url__": str(path)}  # type: ignore[union-attr]
            for info in tar
            if info.isfile()
        )
        try:
            for sample in group_by_keys(members):
                key = str(sample["__key__"])
                yield _record(path, key, sample, positions[key], text_field)
        except (tarfile.TarError, OSError) as error:
            raise ValueError(f"{path}: damaged tar: {error}") from None


def _record(
    path: Path, key: str, sample: dict[str, Any], position: int, text_field: str
) -> tuple[int, str | Problem]:
    text = _text(sample, text_field)
    if isinstance(text, Wrong):
        data = b" ".join(v for k, v in sample.items() if k in ("txt", "json"))
        return position, Problem(path, position, None, f"sample {key!r}: {text}", data[:200])
    return position, text


def _text(sample: dict[str, Any], text_field: str) -> str:
    """Return the text of a sample, or what is wrong as Wrong."""
    try:
        if "txt" in sample:
            return str(sample["txt"], "utf-8")
        if "json" not in sample:
            endings = ", ".join(sorted(name for name in sample if not name.startswith("__")))
            return Wrong(f"expected a member .txt or .json, found {endings}")
        record = json.loads(sample["json"])
    except UnicodeDecodeError as error:
        return Wrong(f"invalid UTF-8: byte {error.start} of the member")
    except (ValueError, RecursionError):
        return Wrong("bad JSON")
    if not isinstance(record, dict) or text_field not in record:
        return Wrong(f"expected a JSON object with {text_field!r}, given {show(record)}")
    return text_or_wrong(record[text_field], f"field {text_field!r}")


def _checked(path: Path) -> dict[str, int]:
    """Return the offset of each sample. Raises ValueError for members that a corpus never needs."""
    positions: dict[str, int] = {}
    last = ""
    for info in _headers(path):
        where = f"{path}: member {show(info.name)}"
        if info.isdir():
            continue
        if not info.isfile() or info.issparse():
            raise ValueError(f"{where}: refused: expected a plain file, found a {_kind(info)}")
        pure = PurePosixPath(info.name)
        if pure.is_absolute() or ".." in pure.parts:
            raise ValueError(f"{where}: refused: its path leaves the tar's own folder")
        if info.name.lower().endswith(RUNS_CODE) or ":" in info.name:
            raise ValueError(f"{where}: refused: not a text, and some readers would run it")
        base, _, extension = pure.name.partition(".")
        key = str(pure.with_name(base)) if extension else ""
        if key and key != last and key in positions:
            raise ValueError(f"{where}: sample {key!r} is in two places of the tar")
        if key:
            positions.setdefault(key, info.offset)
            last = key
    return positions


def _headers(path: Path) -> Iterator[tarfile.TarInfo]:
    """Yield all headers. Raises ValueError when the file is shorter than they claim."""
    size = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            end = 0
            for info in tar:
                end = info.offset_data + (info.size if info.isfile() else 0)
                if info.size < 0 or end > size:
                    raise ValueError(
                        f"{path}: member {show(info.name)}: refused: its header claims "
                        f"{info.size:,} bytes, the file has {size:,}"
                    )
                yield info
            _require_end(path, end, size)
    except (tarfile.TarError, OSError, EOFError, OverflowError) as error:
        raise ValueError(f"{path}: damaged tar: {error}") from None


def _require_end(path: Path, end: int, size: int) -> None:
    """Raise ValueError unless two blocks of zeros follow: Python may not see all members then."""
    with path.open("rb") as file:
        file.seek(-(-end // 512) * 512)
        tail = file.read(1024)
    if len(tail) < 1024 or any(tail):
        raise ValueError(
            f"{path}: damaged tar: truncated or broken behind byte {end:,} of {size:,}"
        )


def _kind(info: tarfile.TarInfo) -> str:
    if info.issym() or info.islnk():
        return "link"
    return "device" if info.isdev() else "special file"
