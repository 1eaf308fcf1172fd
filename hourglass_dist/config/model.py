"""The ``model`` section of the settings: limits, defaults, and rules between options.

    YAML  ->  ModelSection (validated, filled in)  ->  ModelSection.build()  ->  ModelConfig

Four complete models stand in ``configs/``: ``lucidrains.yaml``, ``paper.yaml``, ``modern.yaml`` and
``vanilla.yaml``. ``model/settings.py`` explains every setting.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from hourglass_dist.config.loader import Built, ConfigError, Section, parse
from hourglass_dist.model import settings
from hourglass_dist.model.settings import LevelConfig, ModelConfig

PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]

INHERITED = ("dim", "heads", "dim_head", "ff_mult", "dropout")
"""Settings that a level inherits from the model unless it has its own."""
CHECKPOINTING = r"none|full|selective|offload|auto|every [1-9][0-9]*"


class LevelSection(Section):
    """Settings of one level as written in YAML."""

    layers: (
        PositiveInt
        | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2)]
    )
    shorten: PositiveInt = 1
    shorten_choices: list[Annotated[int, Field(ge=2)]] = Field(default_factory=list)
    pooling: settings.Pooling = "fixed"
    extra_buckets: Annotated[int, Field(ge=0)] = 16
    dim: PositiveInt
    heads: PositiveInt
    dim_head: PositiveInt
    ff_mult: PositiveFloat
    dropout: Fraction
    window: PositiveInt | None = None
    activation_checkpointing: str = "none"

    @field_validator("activation_checkpointing")
    @classmethod
    def _is_a_policy(cls, policy: str) -> str:
        if not re.fullmatch(CHECKPOINTING, policy):
            raise ValueError(
                "expected none, full, selective, offload, auto or 'every K' such as 'every 2', "
                f"given {policy!r}"
            )
        return policy

    def build(self) -> LevelConfig:
        """Return the same settings in the form that the model reads."""
        given = dict(self)
        if isinstance(self.layers, list):
            given["layers"] = tuple(self.layers)
        return LevelConfig(**given | {"shorten_choices": tuple(self.shorten_choices)})


class ModelSection(Section):
    """Settings of an hourglass language model; with one level, a plain transformer."""

    dim: PositiveInt
    heads: PositiveInt = 8
    dim_head: PositiveInt | None = None
    ff_mult: PositiveFloat = 4.0
    dropout: Fraction = 0.0
    levels: Annotated[list[LevelSection], Field(min_length=1)]
    vocab_size: Annotated[int, Field(ge=2)] = 256
    max_seq_len: PositiveInt | None = None
    positions: settings.Positions = "learned"
    norm: settings.Norm = "layer"
    stack_norms: bool = False
    feed_forward: settings.Activation = "gelu"
    bias: bool = True
    qk_norm: bool = False
    z_loss: Annotated[float, Field(ge=0.0)] = 0.0
    residual_dropout: bool = False
    downsampling: settings.Downsampling = "mean"
    upsampling: settings.Upsampling = "repeat"
    attention_resampling: settings.ResamplingAttention = "none"
    width_change: settings.WidthChange = "pad"
    skip: settings.Skip = "plain"
    causal: bool = True
    legacy_mask: bool = False

    def build(self) -> ModelConfig:
        """Return the same settings in the form that the model reads."""
        levels = tuple(level.build() for level in self.levels)
        return ModelConfig(**dict(self) | {"levels": levels})

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
    def _levels_make_an_hourglass(self) -> ModelSection:
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
    def _options_fit_together(self) -> ModelSection:
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
                "model.legacy_mask: only for what lucidrains has: learned positions, fixed "
                "pooling, no window, attention_resampling none or bucket",
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


def _describe(section: type[Section], settings: type) -> None:
    """Copy the docstrings of the fields of ``settings`` to the same fields of ``section``."""
    [described] = ast.parse(inspect.getsource(settings)).body
    assert isinstance(described, ast.ClassDef)
    for field, text in pairwise(described.body):
        match field, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str())):
                section.model_fields[name].description = ast.literal_eval(text.value)


_describe(LevelSection, LevelConfig)
_describe(ModelSection, ModelConfig)
Model = Annotated[ModelConfig, Built(ModelSection)]
"""Type of a setting that is a model: validated as ModelSection, stored as ModelConfig."""


def parse_model(written: dict[str, Any], *, source: str = "") -> ModelConfig:
    """Return the checked settings of a model, defaults filled in.

    Raises ConfigError with a line for every mistake; ``source`` names the file in them.
    """
    return parse(ModelSection, written, source=source, prefix="model").build()


def lucidrains_config(
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
    """Return the settings of hourglass-transformer-pytorch 0.0.6's ``HourglassTransformerLM``.

    ``depth`` nests as ``(pre, inner, post)``, lists or tuples; ``shorten_factor`` is one number for
    every nesting, or one for each. Raises ConfigError when they do not fit together.
    """
    ways = {"naive": ("mean", "repeat"), "linear": ("linear", "linear")}
    if updown_sample_type not in ways:
        raise ConfigError(
            f"updown_sample_type: expected naive or linear, given {updown_sample_type!r}"
        )
    down, up = ways[updown_sample_type]
    written = {
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
    return parse_model(written, source="lucidrains_config")


def _inherit(level: Any, model: dict[str, Any], index: int) -> Any:
    """Return ``level`` with what it inherits from ``model``; wrong types stay for later checks."""
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
            level["dim_head"] = 1  # other checks refuse these values
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
    """Return the levels of a notation such as ``"4@1 8@3 4@1"``.

    Raises ValueError when it is not a palindrome of layers@stride, does not begin at stride 1, or a
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
