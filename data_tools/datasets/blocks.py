"""The samples of a shard, read as any WebDataset tool would: from the tar, without the manifest."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hourglass_dist.data.manifest import DTypeName, dtype_of


@dataclass(frozen=True)
class Sample:
    """One block with its members as they are in the file."""

    key: str
    offset: int
    """Where the ids begin in the file, in bytes."""
    members: dict[str, bytes]
    """By extension: tokens.u8 (or u16, u32), ends.u32, json."""
    tokens_T: npt.NDArray[np.unsignedinteger[Any]]
    ends: npt.NDArray[np.uint32]
    tokens: int
    """How many of the ids are no padding, as the json member says."""
    crc32c: dict[str, str]
    """Of the two other members, as the json member says."""


def read_samples(path: Path, dtype: DTypeName) -> Iterator[Sample]:
    """The samples of a shard. Raises ValueError when it is no tar or a member is missing."""
    try:
        with tarfile.open(path) as tar:
            infos: dict[str, dict[str, tarfile.TarInfo]] = {}
            for info in tar:
                key, _, extension = info.name.partition(".")
                infos.setdefault(key, {})[extension] = info
            for key, by_extension in infos.items():
                yield _sample(tar, key, by_extension, dtype)
    except (tarfile.TarError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a shard of blocks: {error!r}") from None


def _sample(
    tar: tarfile.TarFile, key: str, infos: dict[str, tarfile.TarInfo], dtype: DTypeName
) -> Sample:
    members = {}
    for extension, info in infos.items():
        file = tar.extractfile(info)
        members[extension] = file.read() if file else b""
    tokens = f"tokens.{dtype}"
    about = json.loads(members["json"])
    return Sample(
        key=key,
        offset=infos[tokens].offset_data,
        members=members,
        tokens_T=np.frombuffer(members[tokens], dtype_of(dtype)),
        ends=np.frombuffer(members["ends.u32"], dtype="<u4"),
        tokens=int(about["tokens"]),
        crc32c={name: about["crc32c"][name] for name in (tokens, "ends.u32")},
    )
