"""Floating-point operations of a model, by formulas; a test compares them with PyTorch's count.

Only matrix products are counted (a multiply-add is two operations), as is usual for model FLOPs
utilization: norms, softmax and pooling are left out. FLOPs of one row, with n positions and width d
of a level, I = heads * dim_head, F hidden width, f = 2 (GELU) or 3 (SwiGLU), P query-key pairs,
g positions of the next level, s positions in a bucket, V vocabulary:

    a layer                    2 n (4 d I + f d F) + 4 P I
    pooling in a bucket        4 g d I + 4 g s d I + feed-forward of g       (from 8 positions on
                               4 g d I + 4 g d I + 4 g s H d, H heads)
    unpooling                  4 g d I + feed-forward of n
    attention across levels    2 q d I + 4 k d I + 2 q d I + 4 P I + feed-forward of q, each way
    linear resampling          2 g s d^2, each way
    width change, d to e       2 g d e, each way
    output layer               2 n d V

Relative positions make attention twice as wide and add 2 q I dim_head for q queries.
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
    """FLOPs of one level on one row, with its resampling layers to and from the next level."""

    stride: int
    """Tokens under one position."""
    forward: int
    recomputed: int
    """FLOPs that activation checkpointing adds to the backward pass."""


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs of a model on rows of one length."""

    length: int
    """Tokens in a row."""
    levels: tuple[LevelFlops, ...]
    """FLOPs of each level, outermost first."""
    head: int
    """FLOPs of the output layer in the forward pass of one row."""

    @property
    def forward_per_token(self) -> float:
        """FLOPs of the forward pass per token."""
        return (sum(level.forward for level in self.levels) + self.head) / self.length

    @property
    def training_per_token(self) -> float:
        """FLOPs per token of forward and backward pass without recomputation, as in MFU."""
        return 3 * self.forward_per_token

    @property
    def recomputed(self) -> int:
        """FLOPs that activation checkpointing adds to the backward pass of one row."""
        return sum(level.recomputed for level in self.levels)

    @property
    def hardware_per_token(self) -> float:
        """FLOPs per token of forward and backward pass with recomputation, as in HFU."""
        return self.training_per_token + self.recomputed / self.length


def model_flops(
    config: ModelConfig, length: int, *, packed: bool = False, dense_attention: bool = False
) -> ModelFlops:
    """Return the FLOPs of a model on rows of ``length`` tokens.

    ``packed`` rows hold several documents that do not attend to each other; their pairs are counted
    as those of one document. ``dense_attention`` counts all pairs that a kernel without a causal
    path computes, as PyTorch's counter does. Levels with ``shorten_choices`` are counted with
    ``shorten``.
    """
    levels = tuple(_levels(config, length, packed, dense_attention))
    return ModelFlops(length, levels, 2 * length * config.levels[0].dim * config.vocab_size)


class _Pairs(NamedTuple):
    """Numbers of queries, keys and pairs of one attention."""

    queries: int
    keys: int
    needed: int
    """Pairs that the mask lets through."""
    computed: int
    """Pairs that a kernel without a causal path computes."""


class _Between(NamedTuple):
    """Two neighbouring levels, with ``n`` and ``g`` positions."""

    outer: LevelConfig
    inner: LevelConfig
    n: int
    g: int
    regular: bool
    """Whether bucket i ends at position i*s in every row."""

    @property
    def down(self) -> _Pairs:
        """Pairs of pooled queries and earlier positions; irregular buckets count as evenly long."""
        last = (self.g - 1) * self.inner.shorten if self.regular else self.n - 1
        return _Pairs(self.g, self.n, self.g + self.g * last // 2, self.g * self.n)

    @property
    def up(self) -> _Pairs:
        """Pairs of positions as queries and earlier pooled tokens as keys."""
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
    """Return the pairs of the self-attention of a level with ``n`` positions."""
    if not config.causal:
        return _Pairs(n, n, n * n, n * n)
    window = level.window
    if window is None or window >= n:
        return _Pairs(n, n, n * (n + 1) // 2, n * n)
    blocks = -(-n // window)  # each computes all pairs of W queries and 2 W keys
    needed = window * n - window * (window - 1) // 2
    return _Pairs(n, n, needed, blocks * 2 * window * window)


def _mixing(config: ModelConfig, level: LevelConfig, pairs: _Pairs, dense: bool) -> int:
    """Return the FLOPs of softmax(q k) v and of the relative position terms."""
    relative = config.positions == "relative"
    place = 2 * pairs.queries * level.inner * level.dim_head if relative else 0
    wide = 2 if relative else 1
    return 4 * (pairs.computed if dense else pairs.needed) * level.inner * wide + place


def _feed_forward(config: ModelConfig, level: LevelConfig, n: int) -> int:
    matrices = 3 if config.feed_forward == "swiglu" else 2
    return 2 * n * matrices * level.dim * level.hidden


def _earlier_attention(config: ModelConfig, level: LevelConfig, pairs: _Pairs, dense: bool) -> int:
    """Return the FLOPs of attention across levels and of the feed-forward layer after it."""
    projections = 4 * (pairs.queries + pairs.keys) * level.dim * level.inner
    mixing = _mixing(config, level, pairs, dense)
    return projections + mixing + _feed_forward(config, level, pairs.queries)


def _down(config: ModelConfig, between: _Between, dense: bool) -> int:
    """Return the FLOPs of downsampling to the inner level."""
    outer, g, s = between.outer, between.g, between.inner.shorten
    d, inner = outer.dim, outer.inner
    flops = 2 * g * s * d * d if config.downsampling == "linear" else 0
    if config.attention_resampling == "earlier":
        flops += _earlier_attention(config, outer, between.down, dense)
    elif config.attention_resampling == "bucket":
        keys_values = 4 * g * s * d * inner
        if s >= MANY_KEYS:  # the key projection is applied to queries, the value projection last
            keys_values = 4 * g * d * inner + 4 * g * s * outer.heads * d
        flops += 4 * g * d * inner + keys_values + _feed_forward(config, outer, g)
    return flops + _width_change(config, between)


def _up(config: ModelConfig, between: _Between, dense: bool) -> int:
    """Return the FLOPs of upsampling from the inner level."""
    outer, g, d = between.outer, between.g, between.outer.dim
    flops = 2 * g * d * between.inner.shorten * d if config.upsampling == "linear" else 0
    if config.attention_resampling == "earlier":
        flops += _earlier_attention(config, outer, between.up, dense)
    elif config.attention_resampling == "bucket":  # one key per position: only values and output
        flops += 4 * g * d * outer.inner + _feed_forward(config, outer, between.n)
    return flops + _width_change(config, between)


def _width_change(config: ModelConfig, between: _Between) -> int:
    changes = config.width_change == "projection" and between.inner.dim != between.outer.dim
    return 2 * between.g * between.outer.dim * between.inner.dim if changes else 0
