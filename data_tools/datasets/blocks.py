"""Samples of a shard, read from the tar without the manifest, as any WebDataset tool would."""

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
    """Block of a shard with its members as stored."""

    key: str
    offset: int
    """Offset of the ids in the file, bytes."""
    members: dict[str, bytes]
    """Members by extension: tokens.u8 (or u16, u32), ends.u32, json."""
    tokens_T: npt.NDArray[np.unsignedinteger[Any]]
    ends: npt.NDArray[np.uint32]
    tokens: int
    """Number of ids without padding, as stated in the json member."""
    crc32c: dict[str, str]
    """crc32c of the two other members, as stated in the json member."""


def read_samples(path: Path, dtype: DTypeName) -> Iterator[Sample]:
    """Yield the samples of a shard. Raises ValueError when it is no tar or a member is missing."""
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
