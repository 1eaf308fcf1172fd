"""The floating-point operations of a model, as a formula; a test holds it to what PyTorch counts.

Matrix products only (a multiply-add is two), as is usual for model FLOPs utilisation: norms,
softmax and pooling are left out. Of one row, with n positions and width d of a level, I = heads *
dim_head, F hidden width, f = 2 (GELU) or 3 (SwiGLU), P pairs of queries and keys, g positions of
the next level, s positions in a bucket, V vocabulary:

    a layer                    2 n (4 d I + f d F) + 4 P I
    pooling in a bucket        4 g d I + 4 g s d I + feed-forward of g       (from 8 positions on
                               4 g d I + 4 g d I + 4 g s H d, H heads)
    back from it               4 g d I + feed-forward of n
    attention across levels    2 q d I + 4 k d I + 2 q d I + 4 P I + feed-forward of q, each way
    linear resampling          2 g s d^2, each way
    a change of width, d to e  2 g d e, each way
    output layer               2 n d V

Relative positions make attention twice as wide and add 2 q I dim_head to a query.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from hourglass_dist.model.checkpointing import recomputes
from hourglass_dist.model.layout import bucket_count
from hourglass_dist.model.resample import MANY_KEYS
from hourglass_dist.model.settings import LevelConfig, ModelConfig


@dataclass(frozen=True)
class LevelFlops:
    """Operations of one level with the ways to the next one and back, of one row."""

    stride: int
    """Tokens under one position."""
    forward: int
    recomputed: int
    """What activation checkpointing adds to the backward pass."""


@dataclass(frozen=True)
class ModelFlops:
    """Operations of a model on rows of one length."""

    length: int
    """Tokens in a row."""
    levels: tuple[LevelFlops, ...]
    """Outermost first."""
    head: int
    """Of the output layer, in the forward pass of one row."""

    @property
    def forward_per_token(self) -> float:
        """Forward pass, for one token at full resolution."""
        return (sum(level.forward for level in self.levels) + self.head) / self.length

    @property
    def training_per_token(self) -> float:
        """Forward and backward pass without recomputation: the numerator of MFU."""
        return 3 * self.forward_per_token

    @property
    def recomputed(self) -> int:
        """What activation checkpointing adds to the backward pass of one row."""
        return sum(level.recomputed for level in self.levels)

    @property
    def hardware_per_token(self) -> float:
        """Forward and backward pass with recomputation: the numerator of HFU."""
        return self.training_per_token + self.recomputed / self.length


def model_flops(
    config: ModelConfig, length: int, *, packed: bool = False, dense_attention: bool = False
) -> ModelFlops:
    """The operations of ``config`` on rows of ``length`` tokens.

    ``packed`` rows hold several documents, kept apart: the pairs that attention needs depend on
    these, and are counted as those of one document. ``dense_attention`` counts all pairs that are
    computed without a causal kernel, as PyTorch does. Levels with ``shorten_choices`` cost what
    they cost with ``shorten``.
    """
    levels = tuple(_levels(config, length, packed, dense_attention))
    return ModelFlops(length, levels, 2 * length * config.levels[0].dim * config.vocab_size)


class _Pairs(NamedTuple):
    """Queries and keys of one attention."""

    queries: int
    keys: int
    needed: int
    """Pairs that are seen."""
    computed: int
    """Pairs that a kernel without causal path computes."""


class _Between(NamedTuple):
    """Two levels, from the outer one's side."""

    outer: LevelConfig
    inner: LevelConfig
    n: int
    g: int
    regular: bool
    """Whether bucket i ends at position i*s in every row."""

    @property
    def down(self) -> _Pairs:
        """Pooled tokens see the positions up to theirs; irregular ones as if they lay evenly."""
        last = (self.g - 1) * self.inner.shorten if self.regular else self.n - 1
        return _Pairs(self.g, self.n, self.g + self.g * last // 2, self.g * self.n)

    @property
    def up(self) -> _Pairs:
        """Positions see the pooled tokens up to theirs."""
        s = self.inner.shorten
        whole, rest = divmod(self.n, s)
        needed = s * whole * (whole + 1) // 2 + rest * (whole + 1)
        if not self.regular:
            needed = self.n * (self.g + 1) // 2
        return _Pairs(self.n, self.g, needed, self.n * self.g)


def _levels(config: ModelConfig, length: int, packed: bool, dense: bool) -> Iterator[LevelFlops]:
    n, stride = length, 1
    for index, level in enumerate(config.levels):
        layer = _layer(config, level, n, dense)
        modules = [(number, layer) for number in range(level.pre + level.post)]
        g, shorten = 0, 1
        if index + 1 < len(config.levels):
            inner = config.levels[index + 1]
            shorten = inner.shorten
            regular = inner.pooling == "fixed" and not packed
            g = bucket_count(n, shorten) + (0 if regular else inner.extra_buckets)
            between = _Between(level, inner, n, g, regular)
            modules += [(0, _down(config, between, dense)), (0, _up(config, between, dense))]
        policy = level.activation_checkpointing
        again = [flops for number, flops in modules if recomputes(policy, number)]
        yield LevelFlops(
            stride=stride,
            forward=sum(flops for _, flops in modules),
            recomputed=0 if policy == "selective" else sum(again),
        )
        n, stride = g, stride * shorten


def _layer(config: ModelConfig, level: LevelConfig, n: int, dense: bool) -> int:
    projections = 2 * n * 4 * level.dim * level.inner
    mixing = _mixing(config, level, _self_pairs(config, level, n), dense)
    return projections + mixing + _feed_forward(config, level, n)


def _self_pairs(config: ModelConfig, level: LevelConfig, n: int) -> _Pairs:
    """What the positions of a level see of each other."""
    if not config.causal:
        return _Pairs(n, n, n * n, n * n)
    window = level.window
    if window is None or window >= n:
        return _Pairs(n, n, n * (n + 1) // 2, n * n)
    blocks = -(-n // window)  # each computes all pairs of W queries and 2 W keys
    needed = window * n - window * (window - 1) // 2
    return _Pairs(n, n, needed, blocks * 2 * window * window)


def _mixing(config: ModelConfig, level: LevelConfig, pairs: _Pairs, dense: bool) -> int:
    """softmax(q k) v, and what makes relative queries."""
    relative = config.positions == "relative"
    place = 2 * pairs.queries * level.inner * level.dim_head if relative else 0
    wide = 2 if relative else 1
    return 4 * (pairs.computed if dense else pairs.needed) * level.inner * wide + place


def _feed_forward(config: ModelConfig, level: LevelConfig, n: int) -> int:
    matrices = 3 if config.feed_forward == "swiglu" else 2
    return 2 * n * matrices * level.dim * level.hidden


def _earlier_attention(config: ModelConfig, level: LevelConfig, pairs: _Pairs, dense: bool) -> int:
    """Attention from one level to another, and the feed-forward layer after it."""
    projections = 4 * (pairs.queries + pairs.keys) * level.dim * level.inner
    mixing = _mixing(config, level, pairs, dense)
    return projections + mixing + _feed_forward(config, level, pairs.queries)


def _down(config: ModelConfig, between: _Between, dense: bool) -> int:
    """The way to the inner level."""
    outer, g, s = between.outer, between.g, between.inner.shorten
    d, inner = outer.dim, outer.inner
    flops = 2 * g * s * d * d if config.downsampling == "linear" else 0
    if config.attention_resampling == "earlier":
        flops += _earlier_attention(config, outer, between.down, dense)
    elif config.attention_resampling == "bucket":
        keys_values = 4 * g * s * d * inner
        if s >= MANY_KEYS:  # the query is taken through the key projection, the mixed values after
            keys_values = 4 * g * d * inner + 4 * g * s * outer.heads * d
        flops += 4 * g * d * inner + keys_values + _feed_forward(config, outer, g)
    return flops + _width_change(config, between)


def _up(config: ModelConfig, between: _Between, dense: bool) -> int:
    """The way back from it."""
    outer, g, d = between.outer, between.g, between.outer.dim
    flops = 2 * g * d * between.inner.shorten * d if config.upsampling == "linear" else 0
    if config.attention_resampling == "earlier":
        flops += _earlier_attention(config, outer, between.up, dense)
    elif config.attention_resampling == "bucket":  # one key a position: values and output only
        flops += 4 * g * d * outer.inner + _feed_forward(config, outer, between.n)
    return flops + _width_change(config, between)


def _width_change(config: ModelConfig, between: _Between) -> int:
    changes = config.width_change == "projection" and between.inner.dim != between.outer.dim
    return 2 * between.g * between.outer.dim * between.inner.dim if changes else 0
