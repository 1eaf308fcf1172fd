"""The settings of a model: levels, and what the layers of all levels are made of.

Four complete models stand in ``configs/``: ``seed.yaml``, ``paper.yaml``, ``modern.yaml`` and
``vanilla.yaml``. Sources named below: *seed* is hourglass-transformer-pytorch 0.0.6, *paper* is
Nawrot et al. 2021 (arXiv 2110.13711) with its Trax code, *SpaceByte* is Slagle 2024 (arXiv
2404.14408).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from hourglass_dist.config.loader import ConfigError, Section, parse

PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]

INHERITED = ("dim", "heads", "dim_head", "ff_mult", "dropout")
"""What a level takes from the model where it says nothing itself."""
CHECKPOINTING = r"none|full|selective|offload|auto|every [1-9][0-9]*"


class LevelConfig(Section):
    """One resolution of the hourglass. The last level of the list is the innermost (shortest)
    one."""

    layers: (
        PositiveInt
        | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2)]
    )
    """[pre, post]: layers on the way down and on the way up. Innermost level: one number."""
    shorten: PositiveInt = 1
    """How many positions of the level above make one position here, on average at least. Level 0:
    1. Others: 2 or more."""
    shorten_choices: list[Annotated[int, Field(ge=2)]] = Field(default_factory=list)
    """Shorten-factor dropout (paper, section 3.2): each training step draws one of these; scoring
    and generation use ``shorten``. Empty: always ``shorten``."""
    pooling: Literal["fixed", "spacelike"] = "fixed"
    """Where buckets begin. ``fixed``: every ``shorten`` positions. ``spacelike``: at word starts,
    where a space-like byte is followed by another kind (SpaceByte); level 1 and bytes only."""
    extra_buckets: Annotated[int, Field(ge=0)] = 16
    """Buckets that a document (and a row of packed documents) may have beyond length / shorten.
    Word starts past that begin no bucket: their positions stay in the one before."""
    dim: PositiveInt
    """Width of the residual stream. Left out: model.dim."""
    heads: PositiveInt
    """Attention heads. Left out: model.heads."""
    dim_head: PositiveInt
    """Width of one head. Left out: model.dim_head, else dim / heads."""
    ff_mult: PositiveFloat
    """Hidden width of the feed-forward layers, as a multiple of dim. Left out: model.ff_mult."""
    dropout: Fraction
    """Probability of dropping an attention weight or a hidden unit. Left out: model.dropout."""
    window: PositiveInt | None = None
    """Positions of this level that a query sees, itself included; null: all earlier ones."""
    activation_checkpointing: str = "none"
    """What the backward pass recomputes. ``full``: every layer, only its input is kept. ``every
    K``: each K-th layer. ``selective``: all but attention and matrix products. ``offload``:
    nothing, but what is kept waits in CPU memory (GPUs only). ``auto``: the cheapest of none,
    selective and full that fits train.activation_memory."""

    @field_validator("activation_checkpointing")
    @classmethod
    def _is_a_policy(cls, policy: str) -> str:
        if not re.fullmatch(CHECKPOINTING, policy):
            raise ValueError(
                "expected none, full, selective, offload, auto or 'every K' such as 'every 2', "
                f"given {policy!r}"
            )
        return policy

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


class ModelConfig(Section):
    """An hourglass language model; with one level, a plain transformer."""

    dim: PositiveInt
    """Width of the residual stream, at every level that does not say otherwise."""
    heads: PositiveInt = 8
    """Attention heads."""
    dim_head: PositiveInt | None = None
    """Width of one attention head; null: dim / heads. heads x dim_head may differ from dim."""
    ff_mult: PositiveFloat = 4
    """Hidden width of the feed-forward layers, as a multiple of dim."""
    dropout: Fraction = 0.0
    """Probability of dropping an attention weight or a hidden unit."""
    levels: Annotated[list[LevelConfig], Field(min_length=1)]
    """From full resolution inwards; the last one is the innermost. In place of levels,
    ``hierarchy: "4@1 8@3 4@1"`` gives layers and strides in the paper's notation."""
    vocab_size: Annotated[int, Field(ge=2)] = 256
    """Rows of the embedding table and of the output layer. At least the tokenizer's size."""
    max_seq_len: PositiveInt | None = None
    """Length of the learned position table, in tokens; null where positions are not learned: then
    the model takes any length."""
    positions: Literal["learned", "relative", "rope"] = "learned"
    """``learned``: a table (seed). ``relative``: Transformer-XL terms, distances times the stride
    (paper). ``rope``: rotated queries and keys, counted per level (Su et al., arXiv 2104.09864)."""
    norm: Literal["layer", "rms"] = "layer"
    """LayerNorm (seed, paper) or RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467)."""
    stack_norms: bool = False
    """A norm at the end of every stack of layers and on the upsampled branch (paper)."""
    feed_forward: Literal["gelu", "swiglu"] = "gelu"
    """GELU (seed, paper) or SwiGLU (Shazeer 2020, arXiv 2002.05202)."""
    bias: bool = True
    """Biases in linear layers and norms (seed); queries, keys and values never have any."""
    qk_norm: bool = False
    """RMSNorm on the queries and keys of each head (Henry et al. 2020, arXiv 2010.04245)."""
    z_loss: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of a penalty that keeps the output layer's normalizer near 1; 1e-4 is usual."""
    residual_dropout: bool = False
    """Drop from the embeddings and from what each branch adds, too (paper)."""
    downsampling: Literal["mean", "linear"] = "mean"
    """How a bucket becomes one position: its mean, or a learned projection of its positions."""
    upsampling: Literal["repeat", "linear"] = "repeat"
    """How a position becomes a bucket again: repeated, or by a learned projection."""
    attention_resampling: Literal["none", "bucket", "earlier"] = "none"
    """Attention between two levels. ``bucket``: a pooled token sees its own bucket, a position its
    own pooled token (seed). ``earlier``: all earlier ones, too (paper)."""
    width_change: Literal["pad", "projection"] = "pad"
    """Where an inner level is wider: append a learned vector going in and cut it off coming out
    (as H-Net, arXiv 2507.07955), or project both ways."""
    skip: Literal["plain", "gated"] = "plain"
    """What the upsampled branch is added to: the stream outside, or that times a learned gate."""
    causal: bool = True
    """False makes an encoder: no shift, every position sees every other. Training needs true."""
    legacy_mask: bool = False
    """Treat key padding masks as the seed does, faults included: absolute positions, fully masked
    queries see all keys, the mean of a bucket includes padding."""

    # --- reading ---------------------------------------------------------------------------------

    @model_validator(mode="before")
    @classmethod
    def _fill_in_levels(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        given = dict(given)
        if (notation := given.pop("hierarchy", None)) is not None:
            if given.get("levels") is not None:
                raise ValueError("model.hierarchy: give either hierarchy or levels, not both")
            given["levels"] = levels_of(notation)
        if isinstance(levels := given.get("levels"), list):
            given["levels"] = [_inherit(level, given, index) for index, level in enumerate(levels)]
        return given

    @model_validator(mode="after")
    def _levels_make_an_hourglass(self) -> ModelConfig:
        *outer, inner = self.levels
        for index, level in enumerate(self.levels):
            where = f"model.levels.{index}"
            if index == 0 and (level.shorten, level.pooling) != (1, "fixed"):
                raise ValueError(
                    f"{where}.shorten: level 0 is full resolution: expected 1 and fixed pooling, "
                    f"given {level.shorten} and {level.pooling}"
                )
            if index > 0 and level.shorten < 2:
                raise ValueError(f"{where}.shorten: expected 2 or more, given {level.shorten}")
            if level.dim_head % 2 and self.positions != "learned":
                raise ValueError(
                    f"{where}.dim_head: {self.positions} positions need an even width, "
                    f"given {level.dim_head}"
                )
        for index, level in enumerate(outer):
            if isinstance(level.layers, int):
                raise ValueError(
                    f"model.levels.{index}.layers: a level with another one inside takes "
                    f"[pre, post], given {level.layers}"
                )
        if not isinstance(inner.layers, int):
            raise ValueError(
                f"model.levels.{len(outer)}.layers: the innermost level takes one number, "
                f"given {inner.layers}"
            )
        return self

    @model_validator(mode="after")
    def _options_fit_together(self) -> ModelConfig:
        for wrong, message in self._contradictions():
            if wrong:
                raise ValueError(message)
        for index, (outer, inner) in enumerate(pairwise(self.levels), start=1):
            where = f"model.levels.{index}"
            if inner.dim < outer.dim and self.width_change == "pad":
                raise ValueError(
                    f"{where}.dim: {inner.dim} is narrower than the level outside ({outer.dim}); "
                    "padding only widens: set model.width_change=projection"
                )
            if inner.pooling == "spacelike":
                self._check_spacelike(where, index)
            if inner.shorten_choices and "linear" in (self.downsampling, self.upsampling):
                raise ValueError(
                    f"{where}.shorten_choices: a linear projection has one size of bucket; "
                    "use model.downsampling=mean and model.upsampling=repeat"
                )
        return self

    def _contradictions(self) -> list[tuple[bool, str]]:
        table, encoder = self.positions == "learned", not self.causal
        windows = any(level.window for level in self.levels)
        plain = table and not windows and self.attention_resampling != "earlier"
        plain = plain and all(level.pooling == "fixed" for level in self.levels)
        return [
            (
                table and self.max_seq_len is None,
                "model.max_seq_len: learned positions need the length of their table",
            ),
            (
                not table and self.max_seq_len is not None,
                f"model.max_seq_len: {self.positions} positions have no table; leave it out",
            ),
            (
                encoder and not plain,
                "model.causal: an encoder takes learned positions, fixed pooling, no window and no "
                "attention_resampling=earlier",
            ),
            (
                self.legacy_mask and not plain,
                "model.legacy_mask: only for what the seed has: learned positions, fixed pooling, "
                "no window, attention_resampling none or bucket",
            ),
            (
                self.positions == "rope" and self.attention_resampling == "earlier",
                "model.attention_resampling: earlier needs relative (or learned) positions: rope "
                "counts each level on its own",
            ),
        ]

    def _check_spacelike(self, where: str, index: int) -> None:
        if index != 1 or self.vocab_size != 256:
            raise ValueError(
                f"{where}.pooling: spacelike reads bytes: level 1 and vocab_size=256 only, "
                f"given level {index} and vocab_size={self.vocab_size}"
            )
        if self.attention_resampling == "bucket" or "linear" in (
            self.downsampling,
            self.upsampling,
        ):
            raise ValueError(
                f"{where}.pooling: buckets of spacelike have no fixed size: use downsampling=mean, "
                "upsampling=repeat and attention_resampling none or earlier"
            )

    # --- what follows ----------------------------------------------------------------------------

    @property
    def strides(self) -> list[int]:
        """Full-resolution tokens under one position, level by level."""
        strides, stride = [], 1
        for level in self.levels:
            stride *= level.shorten
            strides.append(stride)
        return strides

    @property
    def hierarchy(self) -> str:
        """The paper's notation, e.g. ``4@1 8@3 4@1`` (layers @ stride)."""
        sides = list(zip(self.levels, self.strides, strict=True))
        down = [f"{level.pre}@{stride}" for level, stride in sides]
        up = [f"{level.post}@{stride}" for level, stride in sides]
        return " ".join(down + up[-2::-1])

    @classmethod
    def from_lucidrains(
        cls,
        *,
        num_tokens: int,
        dim: int,
        max_seq_len: int,
        depth: int | Sequence[Any],
        shorten_factor: int | Sequence[int] | None = None,
        heads: int = 8,
        dim_head: int = 64,
        attn_resampling: bool = True,
        updown_sample_type: str = "naive",
        causal: bool = True,
    ) -> ModelConfig:
        """The settings of ``HourglassTransformerLM(**kwargs)`` of hourglass-transformer-pytorch
        0.0.6.

        ``depth`` nests as ``(pre, inner, post)``, lists or tuples; ``shorten_factor`` is one number
        for every nesting, or one for each. Raises ConfigError when they do not fit together.
        """
        ways = {"naive": ("mean", "repeat"), "linear": ("linear", "linear")}
        if updown_sample_type not in ways:
            raise ConfigError(
                f"updown_sample_type: expected naive or linear, given {updown_sample_type!r}"
            )
        down, up = ways[updown_sample_type]
        settings = {
            "dim": dim,
            "heads": heads,
            "dim_head": dim_head,
            "levels": _levels_of_lucidrains(depth, shorten_factor),
            "max_seq_len": max_seq_len,
            "vocab_size": num_tokens,
            "downsampling": down,
            "upsampling": up,
            "attention_resampling": "bucket" if attn_resampling else "none",
            "causal": causal,
        }
        return parse(cls, settings, source="from_lucidrains", prefix="model")


def _inherit(level: Any, model: dict[str, Any], index: int) -> Any:
    """``level`` with what it takes from ``model``; wrong types are left for their own errors."""
    if isinstance(level, LevelConfig):
        return level
    if not isinstance(level, dict):
        return level
    usual = {"heads": 8, "ff_mult": 4, "dropout": 0.0}
    level = dict(level)
    own = any(level.get(name) is not None for name in ("dim", "heads"))
    for name in INHERITED:
        value = model.get(name, usual.get(name))
        if level.get(name) is None and value is not None:
            level[name] = value
    if level.get("dim_head") is None:
        dim, heads = level.get("dim"), level.get("heads")
        if type(dim) is not int or type(heads) is not int or min(dim, heads) < 1:
            level["dim_head"] = 1  # their own errors say what is wrong with them
        elif dim % heads:
            where = f"model.levels.{index}" if own else "model"
            raise ValueError(
                f"{where}.heads: {heads} heads do not divide {where}.dim={dim}; choose another "
                f"number or set {where}.dim_head"
            )
        else:
            level["dim_head"] = dim // heads
    return level


def levels_of(notation: Any) -> list[dict[str, Any]]:
    """``"4@1 8@3 4@1"`` as levels.

    Raises ValueError when it is no palindrome of layers@stride, does not begin at stride 1, or a
    stride does not divide the next one.
    """
    stages = re.findall(r"(\d+)@(\d+)", notation) if isinstance(notation, str) else []
    if not stages or " ".join(f"{n}@{s}" for n, s in stages) != notation:
        raise ValueError(
            "model.hierarchy: expected layers@stride, outermost first, such as '4@1 8@3 4@1', "
            f"given {notation!r}"
        )
    pairs = [(int(layers), int(stride)) for layers, stride in stages]
    if pairs != pairs[::-1] or len(pairs) % 2 == 0:
        raise ValueError(
            f"model.hierarchy: {notation!r} is no palindrome; for other shapes give model.levels"
        )
    half = pairs[: len(pairs) // 2 + 1]
    if half[0][1] != 1:
        raise ValueError(
            f"model.hierarchy: level 0 is full resolution: expected stride 1, given {half[0][1]}"
        )
    levels: list[dict[str, Any]] = []
    for index, (layers, stride) in enumerate(half):
        outer = half[index - 1][1] if index else 1
        if index and (stride <= outer or stride % outer):
            raise ValueError(
                f"model.hierarchy: level {index}: stride {stride} is no multiple of the stride "
                f"outside, {outer}"
            )
        is_innermost = index == len(half) - 1
        levels.append(
            {"layers": layers if is_innermost else [layers, layers], "shorten": stride // outer}
        )
    return levels


def _levels_of_lucidrains(
    depth: int | Sequence[Any], shorten_factor: int | Sequence[int] | None
) -> list[dict[str, Any]]:
    levels: list[dict[str, Any]] = []
    shorten, rest = 1, depth
    factors = iter(
        [shorten_factor] * 64 if isinstance(shorten_factor, int) else list(shorten_factor or ())
    )
    while not isinstance(rest, int):
        if len(rest) != 3:
            raise ConfigError(f"depth: expected (pre, inner, post) or one number, given {rest!r}")
        pre, rest, post = rest
        levels.append({"layers": [pre, post], "shorten": shorten})
        shorten = next(factors, 2 if shorten_factor is None else 0)
        if shorten == 0:
            raise ConfigError(
                f"shorten_factor: {shorten_factor!r} has fewer numbers than depth has nestings"
            )
    levels.append({"layers": rest, "shorten": shorten})
    if not isinstance(shorten_factor, int) and next(factors, None) is not None:
        raise ConfigError(
            f"shorten_factor: {shorten_factor!r} has more numbers than depth has nestings"
        )
    return levels
