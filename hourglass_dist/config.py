"""Every setting of a run, in typed, documented, frozen sections, and ``load``.

A run is described by ``CONFIG.yaml key=value ...``; the rules of reading are in ``sections.py``.
This file knows no torch, no deepspeed and no data: importing it is cheap.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from hourglass_dist.data_config import DataConfig, PositiveFloat, PositiveInt
from hourglass_dist.sections import ConfigError, Section, apply_override, parse, read_yaml

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]


class RunConfig(Section):
    """Where a run lives and what makes it repeatable."""

    dir: str
    """Run folder: settings, checkpoints, TensorBoard events and metrics.jsonl go here."""
    seed: int = Field(default=1337, ge=0)
    """Seeds the weights, dropout and the order of the data."""


class LevelConfig(Section):
    """One resolution of the hourglass. The last level of the list is the innermost (shortest)
    one."""

    layers: (
        PositiveInt
        | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2)]
    )
    """[pre, post]: layers on the way down and on the way up. Innermost level: one number."""
    shorten: PositiveInt = 1
    """How many positions of the level above make one position here. Level 0: 1. Others: 2 or
    more."""
    activation_checkpointing: Literal["none", "full"] = "none"
    """``full``: keep only each layer's input for the backward pass and recompute the rest."""

    @property
    def pre(self) -> int:
        """Layers before the next level (all of them at the innermost level)."""
        return self.layers if isinstance(self.layers, int) else self.layers[0]

    @property
    def post(self) -> int:
        """Layers after the next level (none at the innermost level)."""
        return 0 if isinstance(self.layers, int) else self.layers[1]


class ModelConfig(Section):
    """The hourglass language model: the function of ``hourglass-transformer-pytorch`` 0.0.6."""

    dim: PositiveInt
    """Width of the residual stream, at every level."""
    heads: PositiveInt = 8
    """Attention heads."""
    dim_head: PositiveInt
    """Width of one attention head. Left out, it is dim / heads; given, heads x dim_head may differ
    from dim."""
    levels: Annotated[list[LevelConfig], Field(min_length=1)]
    """From full resolution inwards; the last one is the innermost."""
    max_seq_len: PositiveInt
    """Length of the learned position table, in tokens. The model takes any length from 1 to
    this."""
    vocab_size: Annotated[int, Field(ge=2)] = 256
    """Rows of the embedding table and of the output layer. At least the tokenizer's size."""
    resampling: Literal["naive", "linear"] = "naive"
    """``naive``: mean of a bucket going in, repeat coming out. ``linear``: a learned projection of
    the bucket."""
    attention_resampling: bool = True
    """Pooled tokens attend to their bucket going in, positions to their pooled token coming out."""
    causal: bool = True
    """False makes an encoder: no shift, every position sees every other. Training needs true."""
    ff_mult: PositiveInt = 4
    """Hidden width of the feed-forward layers, as a multiple of dim."""
    attn_dropout: Fraction = 0.0
    """Probability of dropping an attention weight."""
    ff_dropout: Fraction = 0.0
    """Probability of dropping a hidden unit of the feed-forward layers."""

    @model_validator(mode="before")
    @classmethod
    def _heads_divide_the_width(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("dim_head") is not None:
            return given
        dim, heads = given.get("dim"), given.get("heads", 8)
        if type(dim) is not int or type(heads) is not int or min(dim, heads) < 1:
            return given | {"dim_head": 1}  # their own errors say what is wrong with them
        if dim % heads:
            raise ValueError(
                f"model.heads: {heads} heads do not divide model.dim={dim}; "
                "choose another number or set model.dim_head"
            )
        return given | {"dim_head": dim // heads}

    @model_validator(mode="after")
    def _levels_make_an_hourglass(self) -> ModelConfig:
        *outer, inner = self.levels
        for index, level in enumerate(self.levels):
            if index == 0 and level.shorten != 1:
                raise ValueError(
                    "model.levels.0.shorten: level 0 is full resolution: "
                    f"expected 1, given {level.shorten}"
                )
            if index > 0 and level.shorten < 2:
                raise ValueError(
                    f"model.levels.{index}.shorten: expected 2 or more, given {level.shorten}"
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
        """The paper's notation, e.g. ``4@1 8@3 4@1`` (layers @ stride; Nawrot et al. 2021, arXiv
        2110.13711)."""
        down = [
            f"{level.pre}@{stride}" for level, stride in zip(self.levels, self.strides, strict=True)
        ]
        up = [
            f"{level.post}@{stride}"
            for level, stride in zip(self.levels, self.strides, strict=True)
        ]
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
        levels: list[dict[str, Any]] = []
        shorten, rest = 1, depth
        factors = iter(
            [shorten_factor] * 64 if isinstance(shorten_factor, int) else list(shorten_factor or ())
        )
        while not isinstance(rest, int):
            if len(rest) != 3:
                raise ConfigError(
                    f"depth: expected (pre, inner, post) or one number, given {rest!r}"
                )
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
        settings = {
            "dim": dim,
            "heads": heads,
            "dim_head": dim_head,
            "levels": levels,
            "max_seq_len": max_seq_len,
            "vocab_size": num_tokens,
            "resampling": updown_sample_type,
            "attention_resampling": attn_resampling,
            "causal": causal,
        }
        return parse(cls, settings, source="from_lucidrains", prefix="model")


class OptimConfig(Section):
    """AdamW and its learning-rate schedule."""

    lr: PositiveFloat
    """Peak learning rate."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """``cosine``: warm up, then half a cosine to the floor. ``wsd``: warm up, stay, then decay
    linearly at the end."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps of linear warm-up."""
    decay_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    """``wsd`` only: the share of all steps that the final decay takes."""
    min_lr_ratio: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1
    """The floor of the learning rate, as a share of the peak."""
    beta1: Fraction = 0.9
    """Decay of the first moment."""
    beta2: Fraction = 0.95
    """Decay of the second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    """Decoupled weight decay on matrices; embeddings, norms and biases have none."""
    clip_grad_norm: Annotated[float, Field(ge=0.0)] = 1.0
    """Largest global gradient norm; 0 turns clipping off."""


class TrainConfig(Section):
    """How long, how much at a time, in which precision."""

    steps: PositiveInt
    """Optimizer steps of the whole run."""
    micro_batch_size: PositiveInt
    """Rows in one forward pass of one rank. The accumulation steps follow from data.batch_size and
    the world size."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """``bf16``: bf16 weights with fp32 master weights at ZeRO stages 1-3, autocast at stage 0."""


class EvalConfig(Section):
    """Scoring of the held-out split."""

    every: PositiveInt
    """Optimizer steps between evaluations; the last step is always evaluated."""
    batch_size: PositiveInt
    """Rows in one forward pass of one rank."""


class CheckpointConfig(Section):
    """Saving."""

    every: PositiveInt
    """Optimizer steps between checkpoints; the last step is always saved."""
    keep: PositiveInt = 2
    """How many of the newest checkpoints stay on disk."""


class MetricsConfig(Section):
    """Looking at a run."""

    every: PositiveInt = 10
    """Optimizer steps between console lines, TensorBoard points and metrics.jsonl records."""


class ZeroConfig(Section):
    """DeepSpeed's ``zero_optimization`` block: the keys that were tried with our state files.

    Others are refused: some change where DeepSpeed keeps weights (``round_robin_gradients`` and
    ``zero_hpz_partition_size`` were seen to make wrong checkpoints). null is DeepSpeed's default.
    """

    stage: Literal[0, 1, 2, 3] = 1
    """What is sharded: 0 nothing, 1 the optimizer's state, 2 also gradients, 3 also weights."""
    overlap_comm: bool | None = None
    """Reduce gradients while the backward pass goes on."""
    contiguous_gradients: bool | None = None
    """Copy gradients into one buffer as they are made."""
    reduce_bucket_size: PositiveInt | None = None
    """Elements reduced at a time."""
    allgather_bucket_size: PositiveInt | None = None
    """Elements gathered at a time (stages 1 and 2)."""
    stage3_prefetch_bucket_size: PositiveInt | None = None
    """Elements gathered ahead of their use."""
    stage3_param_persistence_threshold: Annotated[int, Field(ge=0)] | None = None
    """Weights with fewer elements are kept whole on every rank."""
    stage3_max_live_parameters: PositiveInt | None = None
    """Elements that are gathered at a time, at most."""


class DeepSpeedConfig(Section):
    """The part of DeepSpeed's own configuration that is passed through.

    Batch sizes, clipping and precision follow from the other sections.
    """

    zero_optimization: ZeroConfig = ZeroConfig()

    @property
    def stage(self) -> int:
        """ZeRO stage, 0 to 3."""
        return self.zero_optimization.stage


class Config(Section):
    """All settings of a training run."""

    run: RunConfig
    data: DataConfig
    model: ModelConfig
    optim: OptimConfig
    train: TrainConfig
    eval: EvalConfig
    checkpoint: CheckpointConfig
    metrics: MetricsConfig = MetricsConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()

    @model_validator(mode="after")
    def _sections_fit_together(self) -> Config:
        for portion in self.data.portions:
            if portion.seq_len > self.model.max_seq_len:
                raise ValueError(
                    f"data.seq_len: {portion.seq_len} is longer than the position table, "
                    f"model.max_seq_len={self.model.max_seq_len}"
                )
            if portion.batch_size % self.train.micro_batch_size:
                raise ValueError(
                    f"train.micro_batch_size: {self.train.micro_batch_size} does not divide "
                    f"data.batch_size={portion.batch_size}"
                )
        if not self.model.causal:
            raise ValueError(
                "model.causal: training and generation need a causal model, given false"
            )
        return self

    def accumulation_steps(self, world_size: int) -> int:
        """Forward passes that one rank makes for one optimizer step after the last phase.

        Raises ConfigError, naming the world sizes that would do, when ``world_size`` does not
        divide the batch of any phase.
        """
        micro = self.train.micro_batch_size
        for rows in dict.fromkeys(portion.batch_size for portion in self.data.portions):
            micro_batches, rest = divmod(rows, micro)
            assert rest == 0
            if micro_batches % world_size:
                good = [n for n in range(1, micro_batches + 1) if micro_batches % n == 0]
                raise ConfigError(
                    f"data.batch_size: {rows} rows in micro batches of {micro} cannot be dealt to "
                    f"{world_size} ranks; world sizes that can: {', '.join(map(str, good))}"
                )
        return self.data.batch_size // micro // world_size


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read ``path`` and apply ``key=value`` overrides. Raises ConfigError with one line for every
    mistake."""
    settings = read_yaml(path)
    keys = [override.partition("=")[0] for override in overrides]
    for key in keys:
        if keys.count(key) > 1:
            raise ConfigError(f"command line: {key}: given {keys.count(key)} times")
    changed = [apply_override(settings, override) for override in overrides]
    return parse(Config, settings, source=str(path), overridden=changed)
