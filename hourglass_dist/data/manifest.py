"""The dataset folder: shards of token blocks, and the manifest that says what is in them.

    DATASET/
        index.json              the manifest, written last: without it there is no dataset
        train-000000.tar ...    WebDataset shards: any tool that reads tar reads them
        train-000000.documents.u64 ...    a row for each document that ends in the shard
        heldout-000000.tar ...
        tokenizer.json ...      the tokenizer of the ids

A sample of a shard is a block of T tokens:

    KEY.tokens.u8|u16|u32   T ids, flat, little-endian; the last block of a split is padded with eos
    KEY.ends.u32            where documents end in the block (the position after their eos)
    KEY.json                source, first document, real tokens, crc32c of the two other members

Reading is by position: the manifest has the offset of every block's ids in its shard, and a row of
L tokens is a view of a block for every L that divides T. Tar is never scanned, nothing is decoded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveInt

from hourglass_dist.config.loader import Section, parse
from hourglass_dist.core.files import replace, sha256_of
from hourglass_dist.data.tokenizer import Fingerprint

FORMAT = 3
"""Version that is written. Readers also know format 2, which had no tables of documents."""
INDEX_FILE = "index.json"

Split = Literal["train", "heldout"]
DTypeName = Literal["u8", "u16", "u32"]


def dtype_name(vocab_size: int) -> DTypeName:
    """Return the smallest type that holds every id. Raises ValueError above 2**32 ids."""
    if vocab_size > 2**32:
        raise ValueError(f"vocabulary: expected at most 2**32 ids, given {vocab_size}")
    return "u8" if vocab_size <= 2**8 else "u16" if vocab_size <= 2**16 else "u32"


def dtype_of(name: DTypeName) -> np.dtype[Any]:
    """Return the numpy type (little-endian) of a member's extension."""
    return np.dtype({"u8": "<u1", "u16": "<u2", "u32": "<u4"}[name])


class Shard(Section):
    """Manifest entry of one shard, a tar file of blocks."""

    path: str = Field(pattern=r"^(train|heldout)-[0-9]{6,}\.tar$")
    """File name within the dataset folder."""
    split: Split
    """Split that its text belongs to."""
    bytes: PositiveInt
    """Size of the file, bytes."""
    sha256: str
    """sha256 (hex) of the file."""
    tokens: PositiveInt
    """Number of tokens without padding. Every block but the last of a split is full."""
    documents: NonNegativeInt
    """Number of documents that end in the shard."""
    text_bytes: NonNegativeInt
    """Number of UTF-8 bytes of text that its tokens stand for."""
    offsets: tuple[PositiveInt, ...] = Field(min_length=1)
    """Offset in the file of the ids of every block, bytes."""
    crc32c: tuple[NonNegativeInt, ...]
    """crc32c of the ids of every block, so that a block read alone is checked, too."""

    @property
    def blocks(self) -> int:
        """Number of blocks in the shard."""
        return len(self.offsets)

    @property
    def table(self) -> str:
        """File name of its table of documents."""
        return self.path.removesuffix(".tar") + ".documents.u64"


class Recipe(Section):
    """How a dataset was made: equal recipe, inputs and tokenizer give an equal dataset."""

    source: str
    """Name of the source of the text; it is stored in every sample."""
    inputs_sha256: str
    """sha256 (hex) over the name, size and content of every input file, in order."""
    separator: str | None
    """Separator of documents in text files; None: a file is one document."""
    text_field: str
    """Field of the text in JSON lines."""
    held_out: str
    """Rule that keeps text out of training: hash:0.01, last:0.1, input:PATH or none."""
    seed: NonNegativeInt
    """Seed of the shuffle of documents."""
    block_tokens: PositiveInt
    """Tokens in a block (T)."""
    shard_blocks: PositiveInt
    """Maximum number of blocks in a shard."""


class Manifest(Section):
    """Manifest of a dataset folder, made by ``Manifest.make`` or ``Manifest.load``."""

    folder: Path = Field(exclude=True)
    """Folder of the dataset; not part of its identity."""
    format: Literal[2, 3]
    """Version of the format."""
    dataset_id: str
    """sha256 (hex) of the fields that format 2 had: a dataset has one id in both formats."""
    tokenizer: Fingerprint
    """Fingerprint of the tokenizer of the ids."""
    eos_id: NonNegativeInt
    """Id that ends every document and pads the last block of a split."""
    dtype: DTypeName
    """Type of the ids: the extension of the tokens member."""
    recipe: Recipe
    """Recipe of the dataset."""
    empty_documents: NonNegativeInt
    """Number of input documents without any text, which are left out."""
    shards: tuple[Shard, ...] = Field(min_length=1)
    """All shards of both splits, in the order of writing."""
    documents_sha256: tuple[str, ...] = ()
    """sha256 (hex) of every shard's table of documents; empty in format 2."""
    heldout_sha256: str | None = None
    """sha256 (hex) of the sorted content hashes of the held-out documents; None in format 2."""

    @classmethod
    def make(cls, folder: Path, **fields: Any) -> Manifest:
        """Return a manifest of the given fields, with its id."""
        blank = cls(folder=folder, format=3, dataset_id="", **fields)
        return blank.model_copy(update={"dataset_id": blank._identity()})

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Return the manifest read from index.json; ``verify`` checks the shards.

        Raises ValueError when the folder or the manifest is missing, damaged, edited or of an
        unknown version.
        """
        path = folder / INDEX_FILE
        if not folder.is_dir():
            found = "a file" if folder.exists() else "none; hourglass data shard makes one"
            raise ValueError(f"{folder}: expected a dataset folder, found {found}")
        if not path.is_file():
            raise ValueError(f"{folder}: no dataset here: expected {INDEX_FILE}, found none")
        try:
            settings = json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            raise ValueError(f"{path}: damaged: not valid JSON") from None
        if not isinstance(settings, dict):
            raise ValueError(f"{path}: damaged: expected a mapping")
        version = settings.get("format")
        if isinstance(version, int) and not 2 <= version <= FORMAT:
            age = "a newer" if version > FORMAT else "an older"
            raise ValueError(
                f"{path}: written by {age} version: format {version}, this one reads 2 to {FORMAT}"
            )
        manifest = parse(cls, settings | {"folder": str(folder)}, source=str(path))
        if manifest.dataset_id != manifest._identity():
            raise ValueError(
                f"{path}: edited or damaged: its content has id {manifest._identity()[:12]}, "
                f"it says {manifest.dataset_id[:12]}"
            )
        return manifest

    def save(self) -> None:
        """Write index.json atomically, after everything else: it makes the dataset complete."""
        text = json.dumps(self.model_dump(mode="json"), indent=1) + "\n"
        replace(self.folder / INDEX_FILE, text)

    def _identity(self) -> str:
        new = {"dataset_id", "documents_sha256", "heldout_sha256"}
        content = self.model_dump(mode="json", exclude=new) | {"format": 2}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    # Splits

    @property
    def block_tokens(self) -> int:
        """Tokens in a block (T)."""
        return self.recipe.block_tokens

    def split(self, split: Split) -> tuple[Shard, ...]:
        """Return the shards of a split. Raises ValueError when there are none."""
        found = tuple(shard for shard in self.shards if shard.split == split)
        if not found:
            raise ValueError(
                f"{self.folder}: no shards of split {split!r}; the dataset was made with "
                f"held-out rule {self.recipe.held_out!r}"
            )
        return found

    def rows(self, split: Split, seq_len: int) -> tuple[int, ...]:
        """Return the number of rows of ``seq_len`` tokens, padding rows excluded, in each shard.

        Raises ValueError when ``seq_len`` does not divide a block, naming near lengths that do.
        """
        block = self.block_tokens
        if seq_len < 1 or block % seq_len:
            lengths = [n for n in range(1, block + 1) if block % n == 0]
            near = sorted(sorted(lengths, key=lambda n: abs(n - seq_len))[:4])
            raise ValueError(
                f"sequence length: {seq_len} does not divide the blocks of {block} tokens of "
                f"{self.folder}; near lengths that do: {', '.join(map(str, near))}"
            )
        return tuple(-(-shard.tokens // seq_len) for shard in self.split(split))

    # Checks

    def verify(
        self,
        split: Split | None = None,
        *,
        full: bool = True,
        part: tuple[int, int] = (0, 1),
        skip: Collection[str] = (),
    ) -> None:
        """Check that no shard is missing or extra, and the size and (when ``full``) sha256 of each.

        ``part`` (i, n) hashes only every n-th shard from the i-th on: a rank's share of the work.
        Files named in ``skip`` are not checked. Raises ValueError naming the shard, the expected
        and the actual value.
        """
        known = {shard.path for shard in self.shards}
        extra = sorted(path.name for path in self.folder.glob("*.tar") if path.name not in known)
        if extra:
            more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
            raise ValueError(
                f"{self.folder / extra[0]}: extra shard{more}: not among the {len(known)} shards "
                f"that {INDEX_FILE} lists"
            )
        shards = self.shards if split is None else self.split(split)
        shards = tuple(shard for shard in shards if shard.path not in skip)
        for shard in shards:
            check_size(self.folder / shard.path, shard)
        if full:
            for shard in shards[part[0] :: part[1]]:
                check_sha256(self.folder / shard.path, shard)


def check_size(path: Path, shard: Shard) -> None:
    """Raise ValueError when a shard is missing or has another size."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise ValueError(f"{path}: missing shard: expected {shard.bytes} bytes") from None
    if size != shard.bytes:
        what = "truncated" if size < shard.bytes else "altered"
        raise ValueError(f"{path}: {what} shard: expected {shard.bytes} bytes, found {size}")


def check_sha256(path: Path, shard: Shard) -> None:
    """Raise ValueError when the sha256 of a shard is not the manifest's."""
    about = path.stat()
    found = _sha256_of_version(
        path, (about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)
    )
    if found != shard.sha256:
        raise ValueError(
            f"{path}: altered shard: expected sha256 {shard.sha256[:12]}, found {found[:12]}"
        )


@cache
def _sha256_of_version(path: Path, version: tuple[int, ...]) -> str:
    """Return the sha256 of a file version, read once per process: every evaluation verifies."""
    return sha256_of(path)
