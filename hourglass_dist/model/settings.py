"""The settings of a model: its levels, and the kinds of layers that all levels share.

Plain frozen dataclasses without defaults: ``config/model.py`` validates what a user writes, fills
in the defaults, and builds these. ``hourglass config --describe`` prints the docstrings below.

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
    """One level of the hourglass. The last one of the list is the innermost (shortest) level."""

    layers: int | tuple[int, int]
    """Number of layers, [pre, post]: before and after the next level; innermost: one number."""
    shorten: int
    """Positions of the next outer level for each position of this level (``spacelike``: on average,
    at least). Level 0: 1. Others: 2 or more."""
    shorten_choices: tuple[int, ...]
    """Shorten-factor dropout (paper, section 3.2): each training step draws one of these; scoring
    and generation use ``shorten``. Empty: always ``shorten``."""
    pooling: Pooling
    """Where buckets begin. ``fixed``: every ``shorten`` positions. ``spacelike``: at word starts,
    where a space-like byte is followed by another kind (SpaceByte); level 1 and bytes only."""
    extra_buckets: int
    """Number of buckets that a document (and a row of packed documents) may have beyond length /
    shorten. Later word starts begin no bucket: their positions stay in the previous one."""
    dim: int
    """Width of the residual stream. Left out: model.dim."""
    heads: int
    """Number of attention heads. Left out: model.heads."""
    dim_head: int
    """Width of one attention head. Left out: model.dim_head, else dim / heads."""
    ff_mult: float
    """Hidden width of the feed-forward layers, as a multiple of dim. Left out: model.ff_mult."""
    dropout: float
    """Probability of dropping an attention weight or a hidden unit. Left out: model.dropout."""
    window: int | None
    """Number of positions of this level that a query sees, its own included; null: all earlier."""
    activation_checkpointing: str
    """Activations that the backward pass recomputes. ``full``: every layer, only its input is kept.
    ``every K``: each K-th layer. ``selective``: all but attention and matrix products. ``offload``:
    none, but kept activations wait in CPU memory (GPUs only). ``auto``: the cheapest of none,
    selective and full that fits train.activation_memory."""

    @property
    def pre(self) -> int:
        """Number of layers before the next level (at the innermost level: all of them)."""
        return self.layers if isinstance(self.layers, int) else self.layers[0]

    @property
    def post(self) -> int:
        """Number of layers after the next level (at the innermost level: 0)."""
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
    """Width of the residual stream, at every level that does not set its own."""
    heads: int
    """Number of attention heads."""
    dim_head: int | None
    """Width of one attention head; null: dim / heads. heads x dim_head may differ from dim."""
    ff_mult: float
    """Hidden width of the feed-forward layers, as a multiple of dim."""
    dropout: float
    """Probability of dropping an attention weight or a hidden unit."""
    levels: tuple[LevelConfig, ...]
    """Levels from full resolution inwards; the last one is the innermost. In place of levels,
    ``hierarchy: "4@1 8@3 4@1"`` gives layers and strides in the paper's notation."""
    vocab_size: int
    """Number of rows of the embedding table and the output layer. At least the tokenizer's size."""
    max_seq_len: int | None
    """Length of the learned position table, in tokens; null where positions are not learned: the
    model then accepts any length."""
    positions: Positions
    """Position encoding. ``learned``: a table (lucidrains). ``relative``: Transformer-XL terms,
    distances times the stride (paper). ``rope``: rotary embeddings, positions counted per level (Su
    et al., arXiv 2104.09864)."""
    norm: Norm
    """Norm: LayerNorm (lucidrains, paper) or RMSNorm (Zhang, Sennrich 2019, arXiv 1910.07467)."""
    stack_norms: bool
    """Whether every stack of layers and the upsampled branch end in a norm (paper)."""
    feed_forward: Activation
    """Activation: GELU (lucidrains, paper) or SwiGLU (Shazeer 2020, arXiv 2002.05202)."""
    bias: bool
    """Whether linear layers and norms have biases (lucidrains); queries, keys, values never do."""
    qk_norm: bool
    """Whether each head's queries and keys get an RMSNorm (Henry et al. 2020, arXiv 2010.04245)."""
    z_loss: float
    """Weight of the z-loss, which keeps the softmax normalizer near 1; 1e-4 is usual."""
    residual_dropout: bool
    """Whether dropout also applies to the embeddings and the output of each branch (paper)."""
    downsampling: Downsampling
    """Pooling of a bucket to one position: its mean, or a learned projection of its positions."""
    upsampling: Upsampling
    """Expansion of a position to its bucket: repeated, or by a learned projection."""
    attention_resampling: ResamplingAttention
    """Attention between two levels. ``bucket``: a pooled token sees its own bucket, a position sees
    its own pooled token (lucidrains). ``earlier``: both see all earlier ones, too (paper)."""
    width_change: WidthChange
    """Change of width at an inner level: ``pad`` appends a learned vector on entry and cuts it off
    on exit (as H-Net, arXiv 2507.07955), ``projection`` projects on entry and exit."""
    skip: Skip
    """Skip connection around the next level: the residual stream, or that times a learned gate."""
    causal: bool
    """Whether positions see earlier ones only. False: an encoder, without shift, not trainable."""
    legacy_mask: bool
    """Whether key padding masks work as in lucidrains, faults included: absolute positions, fully
    masked queries see all keys, the mean of a bucket includes padding."""

    @property
    def strides(self) -> list[int]:
        """Full-resolution tokens under one position, level by level."""
        return list(accumulate((level.shorten for level in self.levels), mul))

    @property
    def hierarchy(self) -> str:
        """The hierarchy in the paper's notation, e.g. ``4@1 8@3 4@1`` (layers @ stride)."""
        sides = list(zip(self.levels, self.strides, strict=True))
        down = [f"{level.pre}@{stride}" for level, stride in sides]
        up = [f"{level.post}@{stride}" for level, stride in sides]
        return " ".join(down + up[-2::-1])

    @property
    def checkpointing(self) -> list[str]:
        """The activation checkpointing policy of every level, outermost first."""
        return [level.activation_checkpointing for level in self.levels]

    def with_checkpointing(self, policies: str | Sequence[str]) -> ModelConfig:
        """Return this model with another activation checkpointing: one policy, or one a level."""
        if isinstance(policies, str):
            policies = [policies] * len(self.levels)
        levels = tuple(
            replace(level, activation_checkpointing=policy)
            for level, policy in zip(self.levels, policies, strict=True)
        )
        return replace(self, levels=levels)
