"""What cost is counted in: the sizes of a micro batch, the parts of a model, pairs of attention.

In names: n positions of a level, g those of the next one, s in a bucket.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from hourglass_dist.model.settings import LevelConfig, ModelConfig

WIDE_BYTES = 4  # norm statistics, softmax normalisers and what the loss sums stay in fp32
INDEX_BYTES = 8  # int64


class Size(NamedTuple):
    """What is computed, and how."""

    config: ModelConfig
    rows: int
    number_bytes: int
    """Of an activation: 4 in fp32, 2 in bf16."""
    dense: bool
    """Count all products of attention, those that a mask takes away too."""
    packed: bool
    """Rows hold several documents, kept apart."""

    def numbers(self, count: int) -> int:
        """Bytes of activations, ``count`` in each row."""
        return self.rows * count * self.number_bytes

    def wide(self, count: int) -> int:
        """Bytes of fp32 numbers, ``count`` in each row."""
        return self.rows * count * WIDE_BYTES

    def indices(self, count: int) -> int:
        """Bytes of indices, ``count`` in each row."""
        return self.rows * count * INDEX_BYTES

    @property
    def relative(self) -> bool:
        """Whether keys and values are twice as wide as a head."""
        return self.config.positions == "relative"

    @property
    def waves(self) -> bool:
        """Whether there are sines and cosines of places."""
        return self.config.positions != "learned"


@dataclass(frozen=True)
class Part:
    """A module or a piece of one."""

    parameters: int = 0
    frozen: int = 0
    """How many of ``parameters`` have no gradient."""
    flops: int = 0
    """Forward pass of one row."""
    kept: int = 0
    """Bytes that wait for the backward pass, of all rows."""
    products: int = 0
    """Bytes of the results that ``selective`` keeps: of matrix products and attention."""

    def __add__(self, other: Part) -> Part:
        return Part(
            self.parameters + other.parameters,
            self.frozen + other.frozen,
            self.flops + other.flops,
            self.kept + other.kept,
            self.products + other.products,
        )


class Pairs(NamedTuple):
    """Queries and keys of one attention."""

    queries: int
    keys: int
    needed: int
    """Pairs that are seen."""
    window: int | None = None
    """Where attention goes in blocks: each computes all pairs of W queries and 2W keys."""

    @property
    def blocks(self) -> int:
        """Blocks of W queries."""
        assert self.window is not None
        return -(-self.queries // self.window)

    @property
    def dense(self) -> int:
        """Pairs that a kernel without causal path computes."""
        if self.window is None:
            return self.queries * self.keys
        return self.blocks * 2 * self.window * self.window


class Between(NamedTuple):
    """Two levels, from the outer one's side."""

    outer: LevelConfig
    inner: LevelConfig
    n: int
    g: int
    regular: bool
    """Bucket i ends at position i*s in every row."""

    @property
    def s(self) -> int:
        """Positions in a bucket."""
        return self.inner.shorten

    def pairs_down(self) -> Pairs:
        """Pooled tokens see the positions up to theirs; irregular ones as if they lay evenly."""
        n, g = self.n, self.g
        last = (g - 1) * self.s if self.regular else n - 1
        return Pairs(g, n, g + g * last // 2)

    def pairs_up(self) -> Pairs:
        """Positions see the pooled tokens up to theirs."""
        n, g = self.n, self.g
        if not self.regular:
            return Pairs(n, g, n * (g + 1) // 2)
        whole, rest = divmod(n, self.s)
        return Pairs(n, g, self.s * whole * (whole + 1) // 2 + rest * (whole + 1))
