"""What a model costs, in closed form: parameters, floating-point operations, activation memory.

The formulas follow ``layers.py``, ``resample.py`` and ``hourglass.py`` product by product, and a
test holds them to what PyTorch counts. Operations are those of matrix products (a multiply-add is
two), as is usual for model FLOPs utilisation; norms, softmax and pooling are left out.

In names: n positions of a level, s of them in a bucket, g = ceil(n / s) buckets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from hourglass_dist.config import LevelConfig, ModelConfig
from hourglass_dist.model.resample import bucket_count

STATISTIC_BYTES = 4
"""Norm statistics, softmax normalisers and the log-probabilities of the loss stay in fp32."""


@dataclass(frozen=True)
class LevelCost:
    """One level with the ways to the next one and back, or what lies around all levels."""

    name: str
    stride: int
    """Tokens under one position."""
    parameters: int
    frozen_parameters: int
    """How many of ``parameters`` have no gradient."""
    flops: int
    """Forward pass of one row."""
    recompute_flops: int
    """What activation checkpointing adds to the backward pass of one row."""
    activation_bytes: int
    """Kept from the forward pass of all rows for the backward pass."""
    recompute_bytes: int
    """Kept on top, for as long as the largest recomputed part takes."""


@dataclass(frozen=True)
class ModelCost:
    """The cost of a model on rows of one length: of its levels, outermost first, and its ends."""

    length: int
    """Tokens in a row."""
    levels: tuple[LevelCost, ...]
    ends: LevelCost
    """Embeddings, final norm, output layer and loss."""

    @property
    def parts(self) -> tuple[LevelCost, ...]:
        """All levels, then the ends."""
        return (*self.levels, self.ends)

    @property
    def parameters(self) -> int:
        """All parameters, frozen ones too."""
        return sum(part.parameters for part in self.parts)

    @property
    def trained_parameters(self) -> int:
        """Parameters that have a gradient."""
        return self.parameters - sum(part.frozen_parameters for part in self.parts)

    @property
    def flops_per_token(self) -> float:
        """Forward pass, for one token at full resolution."""
        return sum(part.flops for part in self.parts) / self.length

    @property
    def training_flops_per_token(self) -> float:
        """Forward and backward pass without recomputation: the numerator of MFU."""
        return 3 * self.flops_per_token

    @property
    def hardware_flops_per_token(self) -> float:
        """Forward and backward pass with recomputation: the numerator of HFU."""
        recomputed = sum(part.recompute_flops for part in self.parts)
        return self.training_flops_per_token + recomputed / self.length

    @property
    def activation_bytes(self) -> int:
        """The most that is kept for the backward pass at one time."""
        kept = sum(part.activation_bytes for part in self.parts)
        return kept + max(part.recompute_bytes for part in self.parts)


def model_cost(
    config: ModelConfig,
    length: int,
    *,
    rows: int = 1,
    bytes_per_number: int = 4,
    dense_attention: bool = False,
) -> ModelCost:
    """The cost of one micro batch of ``rows`` rows of ``length`` tokens, without dropout and masks.

    Causal attention counts the pairs that it needs; with ``dense_attention`` all pairs, as kernels
    without a causal path compute and as PyTorch counts. ``bytes_per_number`` is the size of an
    activation: 4 in fp32, 2 in bf16. Activations are those of the fused attention kernels.
    """
    size = _Size(config, rows, bytes_per_number, dense_attention)
    levels = []
    positions = length
    for index, (level, stride) in enumerate(zip(config.levels, config.strides, strict=True)):
        if index > 0:
            positions = bucket_count(positions, level.shorten)
        inner = config.levels[index + 1] if index + 1 < len(config.levels) else None
        parts = _level_parts(size, level, inner, positions)
        levels.append(_sum_level(f"level {index}", stride, level, parts, size))
    return ModelCost(length, tuple(levels), _ends(size, length))


class _Size(NamedTuple):
    config: ModelConfig
    rows: int
    bytes_per_number: int
    dense: bool

    @property
    def inner(self) -> int:
        return self.config.heads * self.config.dim_head

    @property
    def hidden(self) -> int:
        return self.config.ff_mult * self.config.dim


class _Part(NamedTuple):
    """A module that is checkpointed as a whole. Numbers are those of one row."""

    parameters: int
    flops: int
    kept: int
    """Numbers kept for the backward pass, its new inputs among them."""
    statistics: int
    """Numbers kept in fp32."""
    inputs: int
    """Numbers kept under checkpointing."""
    frozen: int = 0


def _level_parts(
    size: _Size, level: LevelConfig, inner: LevelConfig | None, positions: int
) -> list[_Part]:
    parts = [_layer(size, positions)] * (level.pre + level.post)
    if inner is not None:
        parts += [
            _shorten(size, positions, inner.shorten),
            _lengthen(size, positions, inner.shorten),
        ]
    return parts


def _sum_level(
    name: str, stride: int, level: LevelConfig, parts: list[_Part], size: _Size
) -> LevelCost:
    recomputes = level.activation_checkpointing == "full"
    whole = [
        size.rows * (p.kept * size.bytes_per_number + p.statistics * STATISTIC_BYTES) for p in parts
    ]
    inputs = [size.rows * p.inputs * size.bytes_per_number for p in parts]
    return LevelCost(
        name=name,
        stride=stride,
        parameters=sum(part.parameters for part in parts),
        frozen_parameters=sum(part.frozen for part in parts),
        flops=sum(part.flops for part in parts),
        recompute_flops=sum(part.flops for part in parts) if recomputes else 0,
        activation_bytes=sum(inputs if recomputes else whole),
        recompute_bytes=max(map(int.__sub__, whole, inputs), default=0) if recomputes else 0,
    )


def _layer(size: _Size, n: int) -> _Part:
    """Self-attention and feed-forward on ``n`` positions."""
    dim, inner = size.config.dim, size.inner
    pairs = n * n if size.dense or not size.config.causal else n * (n + 1) // 2
    feed_forward = _feed_forward(size, n)
    return _Part(
        parameters=2 * dim + 4 * dim * inner + dim + feed_forward.parameters,
        flops=2 * n * 4 * dim * inner + 4 * inner * pairs + feed_forward.flops,
        kept=n * (2 * dim + 4 * inner) + feed_forward.kept,  # x, norm(x); q, k, v, mixed
        statistics=n * (2 + size.config.heads) + feed_forward.statistics,
        inputs=n * dim,
    )


def _feed_forward(size: _Size, n: int) -> _Part:
    dim, hidden = size.config.dim, size.hidden
    return _Part(
        parameters=2 * dim + 2 * dim * hidden + hidden + dim,
        flops=4 * n * dim * hidden,
        kept=n * (2 * dim + 2 * hidden),  # x, norm(x); before and after GELU
        statistics=2 * n,
        inputs=n * dim,
    )


def _shorten(size: _Size, n: int, s: int) -> _Part:
    """The way in: pool ``n`` positions by ``s``, let pooled tokens attend to their bucket."""
    config, dim, inner, g = size.config, size.config.dim, size.inner, bucket_count(n, s)
    linear = config.resampling == "linear"
    pool = _Part(
        parameters=s * dim * dim + dim if linear else 0,
        flops=2 * g * s * dim * dim if linear else 0,
        kept=g * s * dim if linear else 0,
        statistics=0,
        inputs=n * dim,
    )
    if not config.attention_resampling:
        return pool
    feed_forward = _feed_forward(size, g)
    mixing = 4 * g * config.heads * s * dim
    return _Part(
        parameters=pool.parameters + 2 * dim + 4 * dim * inner + dim + feed_forward.parameters,
        flops=pool.flops + 2 * g * 4 * dim * inner + mixing + feed_forward.flops,
        # the buckets; pooled, norm(pooled); q, values; looks, mixed; weights
        kept=g * (s * dim + 2 * dim + 2 * inner + 2 * config.heads * dim + config.heads * s)
        + feed_forward.kept,
        statistics=2 * g + feed_forward.statistics,
        inputs=n * dim,
    )


def _lengthen(size: _Size, n: int, s: int) -> _Part:
    """The way out: spread pooled tokens over ``n`` positions, each attends to its pooled token."""
    config, dim, inner, g = size.config, size.config.dim, size.inner, bucket_count(n, s)
    linear = config.resampling == "linear"
    spread = _Part(
        parameters=s * dim * dim + s * dim if linear else 0,
        flops=2 * g * s * dim * dim if linear else 0,
        kept=g * dim if linear else 0,
        statistics=0,
        inputs=g * dim,  # the positions outside are the input of the way in, too
    )
    if not config.attention_resampling:
        return spread
    feed_forward = _feed_forward(size, n)
    frozen = 2 * dim + 2 * dim * inner
    return _Part(
        parameters=spread.parameters + frozen + 2 * dim * inner + dim + feed_forward.parameters,
        flops=spread.flops + 2 * g * 2 * dim * inner + feed_forward.flops,
        kept=g * (dim + inner) + feed_forward.kept,
        statistics=feed_forward.statistics,
        inputs=g * dim,
        frozen=frozen,
    )


def _ends(size: _Size, n: int) -> LevelCost:
    dim, vocabulary = size.config.dim, size.config.vocab_size
    kept = n * 2 * dim * size.bytes_per_number  # x, norm(x)
    statistics = n * (2 + vocabulary) * STATISTIC_BYTES
    return LevelCost(
        name="ends",
        stride=1,
        parameters=(vocabulary + size.config.max_seq_len) * dim + 2 * dim + (dim + 1) * vocabulary,
        frozen_parameters=0,
        flops=2 * n * dim * vocabulary,
        recompute_flops=0,
        activation_bytes=size.rows * (kept + statistics) + STATISTIC_BYTES,  # one: the loss
        recompute_bytes=0,
    )
