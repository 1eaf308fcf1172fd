"""Which text is kept out of training, as a rule in one word.

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
from hourglass_dist.data.shards import Split

_SEED = 0x68656C646F7574
"""Of the hash: another one than duplicates are found by."""
Parts = Iterator[tuple[Split, str]]


@dataclass(frozen=True)
class Rule:
    """No text is held out."""

    text: str
    """The rule as it was given."""

    @property
    def inputs(self) -> tuple[Path, ...]:
        """Input files that the rule itself names."""
        return ()

    def side(self, data: bytes) -> Split | None:
        """The split of a whole document, given as UTF-8; None when parts of it go to both."""
        return "train"

    def parts(self, document: str, source: Path) -> Parts:
        """The document's parts with their splits; ``source`` is the file that it came from."""
        yield "train", document


@dataclass(frozen=True)
class ByHash(Rule):
    """Documents by their content."""

    fraction: Fraction

    def side(self, data: bytes) -> Split:
        """By a hash of all of it."""
        return "heldout" if xxhash.xxh3_64_intdigest(data, _SEED) < self._limit else "train"

    def parts(self, document: str, source: Path) -> Parts:
        """The whole document, to one side."""
        yield self.side(document.encode()), document

    @cached_property
    def _limit(self) -> int:
        return math.ceil(self.fraction * 2**64)


@dataclass(frozen=True)
class ByEnd(Rule):
    """The end of every document."""

    fraction: Fraction

    def side(self, data: bytes) -> None:
        """Both."""
        return

    def parts(self, document: str, source: Path) -> Parts:
        """The first floor((1 - fraction) * n) characters, and the others."""
        cut = math.floor(len(document) * (1 - self.fraction))
        yield "train", document[:cut]
        yield "heldout", document[cut:]


@dataclass(frozen=True)
class ByInput(Rule):
    """Documents by the file that they came from, however its path is spelled."""

    files: frozenset[Path]
    """Resolved paths."""

    @property
    def inputs(self) -> tuple[Path, ...]:
        """The files held out."""
        return tuple(sorted(self.files))

    def side(self, data: bytes) -> None:
        """Not by its text."""
        return

    def parts(self, document: str, source: Path) -> Parts:
        """The whole document, to the side of its file."""
        yield "heldout" if _resolved(source) in self.files else "train", document


@cache
def _resolved(path: Path) -> Path:
    return path.resolve()


def parse_rule(text: str) -> Rule:
    """The rule ``none``, ``hash:FRACTION``, ``last:FRACTION`` or ``input:PATH``.

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
