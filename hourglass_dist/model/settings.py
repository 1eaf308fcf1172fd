"""The settings of a model: its levels, and what the layers of all levels are made of.

Plain frozen dataclasses without defaults: ``config/model.py`` validates what a user writes, fills
in what is left out, and builds these. The docstrings below are also what ``hourglass config`` says
about a setting.

Sources named below: *lucidrains* is hourglass-transformer-pytorch 0.0.6, *paper* is Nawrot et al.
2021 (arXiv 2110.13711) with its Trax code, *SpaceByte* is Slagle 2024 (arXiv 2404.14408).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from operator import mul
from typing import Literal

Pooling = Literal["fixed", "spacelike"]
Positions = Literal["learned", "relative", "rope"]
Norm = Literal["layer", "rms"]
Activation = Literal["gelu", "swiglu"]
Downsampling = Literal["mean", "linear"]
Upsampling = Literal["repeat", "linear"]
ResamplingAttention = Literal["none", "bucket", "earlier"]
WidthChange = Literal["pad", "projection"]
Skip = Literal["plain", "gated"]


@dataclass(frozen=True)
class LevelConfig:
    """One resolution of the hourglass. The last level of the list is the innermost (shortest)
    one."""

    layers: int | tuple[int, int]
    """[pre, post]: layers on the way down and on the way up. Innermost level: one number."""
    shorten: int
    """How many positions of the level above make one position here, on average at least. Level 0:
    1. Others: 2 or more."""
    shorten_choices: tuple[int, ...]
    """Shorten-factor dropout (paper, section 3.2): each training step draws one of these; scoring
    and generation use ``shorten``. Empty: always ``shorten``."""
    pooling: Pooling
    """Where buckets begin. ``fixed``: every ``shorten`` positions. ``spacelike``: at word starts,
    where a space-like byte is followed by another kind (SpaceByte); level 1 and bytes only."""
    extra_buckets: int
    """Buckets that a document (and a row of packed documents) may have beyond length / shorten.
    Word starts past that begin no bucket: their positions stay in the one before."""
    dim: int
    """Width of the residual stream. Left out: model.dim."""
    heads: int
    """Attention heads. Left out: model.heads."""
    dim_head: int
    """Width of one head. Left out: model.dim_head, else dim / heads."""
    ff_mult: float
    """Hidden width of the feed-forward layers, as a multiple of dim. Left out: model.ff_mult."""
    dropout: float
    """Probability of dropping an attention weight or a hidden unit. Left out: model.dropout."""
    window: int | None
    """Positions of this level that a query sees, itself included; null: all earlier ones."""
    activation_checkpointing: str
    """What the backward pass recomputes. ``full``: every layer, only its input is kept. ``every
    K``: each K-th layer. ``selective``: all but attention and matrix products. ``offload``:
    nothing, but what is kept waits in CPU memory (GPUs only). ``auto``: the cheapest of none,
    selective and full that fits train.activation_memory."""

    @property
    def pre(self) -> int:
        """Layers before the next level (all of them at the innermost level)."""
        return self.layers if isinstance(self.layers, int) else self.layers[0]

    @property
    def post(self) -> int:
        """Layers after the next level (none at the innermost level)."""
        return 0 if isinstance(self.layers, int) else self.layers[1]

    @property
    def inner(self) -> int:
        """Width of all heads together."""
        return self.heads * self.dim_head

    @property
    def hidden(self) -> int:
        """Hidden width of the feed-forward layers."""
        return int(self.ff_mult * self.dim)


@dataclass(frozen=True)
class ModelConfig:
    """An hourglass language model; with one level, a plain transformer."""

    dim: int
    """Width of the residual stream, at every level that does not say otherwise."""
    heads: int
    """Attention heads."""
    dim_head: int | None
    """Width of one attention head; null: dim / heads. heads x dim_head may differ from dim."""
    ff_mult: float
    """Hidden width of the feed-forward layers, as a multiple of dim."""
    dropout: float
    """Probability of dropping an attention weight or a hidden unit."""
    levels: tuple[LevelConfig, ...]
    """From full resolution inwards; the last one is the innermost. In place of levels,
    ``hierarchy: "4@1 8@3 4@1"`` gives layers and strides in the paper's notation."""
    vocab_size: int
    """Rows of the embedding table and of the output layer. At least the tokenizer's size."""
    max_seq_len: int | None
    """Length of the learned position table, in tokens; null where positions are not learned: then
    the model takes any length."""
    positions: Positions
    """``learned``: a table (lucidrains). ``relative``: Transformer-XL terms, distances times the
    stride (paper). ``rope``: rotated queries and keys, counted per level (Su et al., arXiv
    2104.09864)."""
    norm: Norm
    """LayerNorm (lucidrains, paper) or RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467)."""
    stack_norms: bool
    """A norm at the end of every stack of layers and on the upsampled branch (paper)."""
    feed_forward: Activation
    """GELU (lucidrains, paper) or SwiGLU (Shazeer 2020, arXiv 2002.05202)."""
    bias: bool
    """Biases in linear layers and norms (lucidrains); queries, keys and values never have any."""
    qk_norm: bool
    """RMSNorm on the queries and keys of each head (Henry et al. 2020, arXiv 2010.04245)."""
    z_loss: float
    """Weight of a penalty that keeps the output layer's normalizer near 1; 1e-4 is usual."""
    residual_dropout: bool
    """Drop from the embeddings and from what each branch adds, too (paper)."""
    downsampling: Downsampling
    """How a bucket becomes one position: its mean, or a learned projection of its positions."""
    upsampling: Upsampling
    """How a position becomes a bucket again: repeated, or by a learned projection."""
    attention_resampling: ResamplingAttention
    """Attention between two levels. ``bucket``: a pooled token sees its own bucket, a position its
    own pooled token (lucidrains). ``earlier``: all earlier ones, too (paper)."""
    width_change: WidthChange
    """Where an inner level is wider: append a learned vector going in and cut it off coming out
    (as H-Net, arXiv 2507.07955), or project both ways."""
    skip: Skip
    """What the upsampled branch is added to: the stream outside, or that times a learned gate."""
    causal: bool
    """False makes an encoder: no shift, every position sees every other. Training needs true."""
    legacy_mask: bool
    """Treat key padding masks as lucidrains does, faults included: absolute positions, fully masked
    queries see all keys, the mean of a bucket includes padding."""

    @property
    def strides(self) -> list[int]:
        """Full-resolution tokens under one position, level by level."""
        return list(accumulate((level.shorten for level in self.levels), mul))

    @property
    def hierarchy(self) -> str:
        """The paper's notation, e.g. ``4@1 8@3 4@1`` (layers @ stride)."""
        sides = list(zip(self.levels, self.strides, strict=True))
        down = [f"{level.pre}@{stride}" for level, stride in sides]
        up = [f"{level.post}@{stride}" for level, stride in sides]
        return " ".join(down + up[-2::-1])

    @property
    def checkpointing(self) -> list[str]:
        """The activation checkpointing of every level, outermost first."""
        return [level.activation_checkpointing for level in self.levels]

    def with_checkpointing(self, policies: str | Sequence[str]) -> ModelConfig:
        """The same model under another activation checkpointing: one for all levels, or one
        each."""
        if isinstance(policies, str):
            policies = [policies] * len(self.levels)
        levels = tuple(
            replace(level, activation_checkpointing=policy)
            for level, policy in zip(self.levels, policies, strict=True)
        )
        return replace(self, levels=levels)
