"""Rules that keep text out of training, each written as one word.

hash:0.01     documents whose content hashes below 1 % (a repeated document lands on one side)
last:0.1      the last tenth of the characters of every document (nanoGPT's split)
input:PATH    the documents of one input file or folder
none          nothing
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, cached_property
from pathlib import Path

import xxhash

from data_tools.sources.text_files import find_inputs
from hourglass_dist.data.manifest import Split

_SEED = 0x68656C646F7574
"""Seed of the hash; duplicates are found with another one."""
Parts = Iterator[tuple[Split, bytes]]
"""Non-empty parts of a document in UTF-8, with their splits."""


@dataclass(frozen=True)
class Rule:
    """Rule that holds no text out; base of the others."""

    text: str
    """Rule as the user gave it."""

    @property
    def inputs(self) -> tuple[Path, ...]:
        """Input files named by the rule itself."""
        return ()

    def parts(self, document: bytes, source: Path) -> Parts:
        """Yield the parts of a document in UTF-8; ``source`` is the file that it came from."""
        if document:
            yield self.side(document, source), document

    def side(self, document: bytes, source: Path) -> Split:
        """Return the split of a whole document."""
        return "train"


@dataclass(frozen=True)
class ByHash(Rule):
    """Rule that holds out documents by a hash of their content."""

    fraction: Fraction

    def side(self, document: bytes, source: Path) -> Split:
        """Return "heldout" for a hash of the whole document below ``fraction``, else "train"."""
        return "heldout" if xxhash.xxh3_64_intdigest(document, _SEED) < self._limit else "train"

    @cached_property
    def _limit(self) -> int:
        return math.ceil(self.fraction * 2**64)


@dataclass(frozen=True)
class ByEnd(Rule):
    """Rule that holds out the end of every document."""

    fraction: Fraction

    def parts(self, document: bytes, source: Path) -> Parts:
        """Yield the first floor((1 - fraction) * n) characters as train, the others as heldout."""
        text = str(document, "utf-8")
        cut = math.floor(len(text) * (1 - self.fraction))
        if train := text[:cut].encode():
            yield "train", train
        if held_out := text[cut:].encode():
            yield "heldout", held_out


@dataclass(frozen=True)
class ByInput(Rule):
    """Rule that holds out the documents of some files, compared by resolved path."""

    files: frozenset[Path]
    """Resolved paths of the held-out files."""

    @property
    def inputs(self) -> tuple[Path, ...]:
        """The held-out files in sorted order."""
        return tuple(sorted(self.files))

    def side(self, document: bytes, source: Path) -> Split:
        """Return "heldout" for a document of a held-out file, else "train"."""
        return "heldout" if _resolved(source) in self.files else "train"


@cache
def _resolved(path: Path) -> Path:
    return path.resolve()


def parse_rule(text: str) -> Rule:
    """Return the rule ``none``, ``hash:FRACTION``, ``last:FRACTION`` or ``input:PATH``.

    Raises ValueError for anything else.
    """
    kind, _, value = text.partition(":")
    if text == "none":
        return Rule(text)
    if kind == "hash":
        return ByHash(text, _fraction(value))
    if kind == "last":
        return ByEnd(text, _fraction(value))
    if kind == "input" and value:
        return ByInput(text, frozenset(map(_resolved, find_inputs([Path(value)]))))
    raise ValueError(
        f"--held-out: expected hash:0.01, last:0.1, input:PATH or none, given {text!r}"
    )


def _fraction(text: str) -> Fraction:
    try:
        fraction = Fraction(text)
    except (ValueError, ZeroDivisionError):
        fraction = Fraction(0)
    if not 0 < fraction < 1:
        raise ValueError(f"--held-out: expected a fraction between 0 and 1, given {text!r}")
    return fraction
