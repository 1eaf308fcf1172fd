"""Every setting of a run, in typed, documented, frozen sections, and ``load``.

A run is described by ``CONFIG key=value ...``; the rules of reading are in ``config/loader.py``.
This file knows no torch, no deepspeed and no data: importing it is cheap.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from hourglass_dist.config import shipped
from hourglass_dist.config.data import DataConfig
from hourglass_dist.config.loader import ConfigError, Section, apply_override, parse, read_yaml
from hourglass_dist.config.model import Fraction, Model, PositiveFloat, PositiveInt


class RunConfig(Section):
    """Where a run lives and what makes it repeatable."""

    dir: str
    """Run folder: settings, checkpoints, TensorBoard events and metrics.jsonl go here."""
    seed: int = Field(default=1337, ge=0)
    """Seeds the weights, dropout and the order of the data."""
    time_limit_hours: PositiveFloat | None = None
    """Hours after which the run saves and ends with exit code 75. Less than a scheduler gives."""
    hang_minutes: PositiveFloat = 10.0
    """Minutes without a step (or a batch of an evaluation) after which every rank writes its stacks
    into the run folder and ends: also how long a cut network stays unnoticed. More than a save may
    take; the start has ten at least."""
    max_fruitless_starts: PositiveInt = 8
    """Starts in a row that crashed before they had saved anything new, after which the run is not
    started again: whatever restarts it would do so for ever."""


class OptimConfig(Section):
    """The optimizer and its learning-rate schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """``muon``: Muon for the matrices between embeddings and output layer, AdamW for the rest, at
    the same learning rate."""
    lr: PositiveFloat
    """Peak learning rate."""
    level_lr: list[PositiveFloat] | None = None
    """What each level's learning rate is multiplied with, one number a level, the outermost
    (embeddings and output layer included) first."""
    schedule: Literal["cosine", "linear", "wsd"] = "cosine"
    """``cosine``: warm up, then half a cosine to the floor. ``linear``: then a straight line to it.
    ``wsd``: warm up, stay, then decay linearly at the end."""
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


class SpikeConfig(Section):
    """When a loss has jumped, and what then."""

    sigmas: PositiveFloat = 6.0
    """Standard deviations over the mean of the window that three losses in a row must exceed."""
    window: Annotated[int, Field(ge=8)] = 64
    """Steps that the mean and the deviation are of; high ones do not count."""
    most: PositiveInt = 3
    """How often a run may go back to its last checkpoint and leave the batches since out."""


class TrainConfig(Section):
    """How long, how much at a time, in which precision."""

    steps: PositiveInt
    """Optimizer steps of the whole run."""
    micro_batch_size: PositiveInt
    """Rows in one forward pass of one rank. The accumulation steps follow from data.batch_size and
    the world size."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """``bf16``: bf16 weights with fp32 master weights at ZeRO stages 1-3, autocast at stage 0.
    ``fp16``: the same in fp16 with a dynamic loss scale, at stages 1-3, for GPUs without bf16."""
    compile: bool = False
    """Compile the training passes of every layer with torch.compile (ZeRO stages 0 to 2; on a CPU
    it needs a C++ compiler). It takes time before the first step, and again for every length."""
    init_from: str | None = None
    """An export whose weights a new run begins with; its model and tokenizer must be the run's."""
    max_skipped_steps: PositiveInt = 8
    """A step with a NaN or infinite loss or gradient changes nothing. So many in a row end the
    run."""
    spikes: SpikeConfig | None = None
    """When the loss jumps and stays up: go back and leave the batches out. null: continue."""
    activation_memory: PositiveFloat | None = None
    """GiB that the activations of one micro batch may take on one rank; what levels with
    ``activation_checkpointing: auto`` are chosen for."""


class EvalConfig(Section):
    """Scoring of the held-out split."""

    every: PositiveInt
    """Optimizer steps between evaluations; the last step is always evaluated."""
    batch_size: PositiveInt
    """Rows in one forward pass of one rank."""
    stride: PositiveInt | None = None
    """Tokens between windows of a second score at the end of the run: every target then has at
    least ``context - stride`` tokens before it. Takes context / stride times as long as the usual
    one. Must divide the context and the block size of the shards. None: no second score."""
    context: PositiveInt | None = None
    """Tokens in a window of that second score. None: data.seq_len."""
    samples: int = Field(default=0, ge=0)
    """Short texts that the model writes at every evaluation. The main rank then holds all
    weights, also at ZeRO-3."""
    prompts: list[str] = Field(default_factory=list)
    """What these continue, in turn. Empty: the first rows of the held-out text."""


class CheckpointConfig(Section):
    """Saving."""

    every: PositiveInt
    """Optimizer steps between checkpoints; the last step is always saved."""
    keep: PositiveInt = 2
    """How many of the newest checkpoints stay on disk."""
    keep_every: PositiveInt | None = None
    """Checkpoints of steps that this divides stay for good."""
    keep_best: bool = False
    """Also keep the one with the lowest held-out bits per byte (of steps that were evaluated)."""
    remote: str | None = None
    """Where copies go, such as s3://bucket/runs/NAME; a run whose folder is gone resumes from
    there."""


class MetricsConfig(Section):
    """Looking at a run."""

    every: PositiveInt = 10
    """Optimizer steps between console lines and records."""
    writers: list[Literal["tensorboard", "wandb", "mlflow"]] = Field(default=["tensorboard"])
    """Where records go besides metrics.jsonl. ``wandb`` and ``mlflow`` must be installed, and take
    project and server from their own environment variables."""
    profile_steps: Annotated[list[PositiveInt], Field(min_length=2, max_length=2)] | None = None
    """The first and the last optimizer step (1 is the first of a run) whose time is taken apart:
    into ``profile/`` of the run folder go a trace and a table by level."""

    @model_validator(mode="after")
    def _in_order(self) -> MetricsConfig:
        if self.profiled and self.profiled[0] > self.profiled[1]:
            raise ValueError(
                "metrics.profile_steps: expected the first and the last step, "
                f"given {self.profile_steps}"
            )
        return self

    @property
    def profiled(self) -> tuple[int, int] | None:
        """``profile_steps``, first and last."""
        return (self.profile_steps[0], self.profile_steps[1]) if self.profile_steps else None


class ZeroConfig(Section):
    """DeepSpeed's ``zero_optimization`` block: the keys that were tried with our state files.

    Others are refused: some change where DeepSpeed keeps weights (``round_robin_gradients`` was
    seen to make wrong checkpoints). null is DeepSpeed's default.
    """

    stage: Literal[0, 1, 2, 3] = 1
    """What is sharded: 0 nothing, 1 the optimizer's state, 2 also gradients, 3 also weights."""
    overlap_comm: bool | None = None
    """Reduce gradients during the backward pass."""
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
    zero_hpz_partition_size: Annotated[int, Field(ge=2)] | None = None
    """Ranks that keep a second copy of all weights among them, those of a node: only the first
    gathering of a step goes beyond them (stage 3; ZeRO++'s hpZ, arXiv 2306.10209)."""
    offload_optimizer: Literal["cpu", "nvme"] | None = None
    """``cpu``: keep master weights and moments in the host's memory, and step there (stages 1 to
    3). ``nvme``: keep them in files between steps (stage 3)."""
    offload_folder: str | None = None
    """Where ``nvme`` has its files: a folder on a fast disk of every machine. 12 bytes of each
    parameter of the machine's ranks, under a path made of ``run.dir``."""
    sub_group_size: PositiveInt | None = None
    """Elements of a rank that are stepped at a time (stage 3). ``nvme`` keeps four copies of so
    many in the host's memory, 4 bytes each; fewer than 262,144 stay there."""
    offload_param: Literal["cpu"] | None = None
    """Keep this rank's part of the weights in the host's memory (stage 3)."""


class DeepSpeedConfig(Section):
    """The part of DeepSpeed's own configuration that is passed through.

    Batch sizes, clipping and precision follow from the other sections.
    """

    zero_optimization: ZeroConfig = ZeroConfig()

    @property
    def stage(self) -> int:
        """ZeRO stage, 0 to 3."""
        return self.zero_optimization.stage

    def group_size(self, world_size: int) -> int | None:
        """Ranks that keep a second copy of the weights among them; None where nobody does, as where
        all ranks are in one group.

        Raises ConfigError when ``world_size`` ranks are not groups of ``zero_hpz_partition_size``.
        """
        size = self.zero_optimization.zero_hpz_partition_size
        if size is None or self.stage < 3 or world_size <= size:
            return None
        if world_size % size:
            raise ConfigError(
                "deepspeed.zero_optimization.zero_hpz_partition_size: expected a size that divides "
                f"the {world_size} ranks, given {size}"
            )
        return size


class Config(Section):
    """All settings of a training run."""

    run: RunConfig
    data: DataConfig
    model: Model
    optim: OptimConfig
    train: TrainConfig
    eval: EvalConfig
    checkpoint: CheckpointConfig
    metrics: MetricsConfig = MetricsConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()

    @model_validator(mode="after")
    def _sections_fit_together(self) -> Config:
        longest = self.model.max_seq_len
        for phase in self.data.all_phases:
            if longest is not None and phase.seq_len > longest:
                raise ValueError(
                    f"data.seq_len: {phase.seq_len} is longer than the position table, "
                    f"model.max_seq_len={longest}"
                )
            if phase.batch_size % self.train.micro_batch_size:
                raise ValueError(
                    f"train.micro_batch_size: {self.train.micro_batch_size} does not divide "
                    f"data.batch_size={phase.batch_size}"
                )
        auto = any(level.activation_checkpointing == "auto" for level in self.model.levels)
        if auto and self.train.activation_memory is None:
            raise ValueError(
                "train.activation_memory: activation_checkpointing: auto needs a budget in GiB"
            )
        scales = self.optim.level_lr
        if scales is not None and len(scales) != len(self.model.levels):
            raise ValueError(
                f"optim.level_lr: expected one number for each of {len(self.model.levels)} levels, "
                f"given {len(scales)}"
            )
        self._check_evaluation()
        self._check_zero()
        if not self.model.causal:
            raise ValueError(
                "model.causal: training and generation need a causal model, given false"
            )
        return self

    def _check_evaluation(self) -> None:
        if self.eval.prompts and not self.eval.samples:
            raise ValueError("eval.prompts: goes with eval.samples, which is 0")
        stride, longest = self.eval.stride, self.model.max_seq_len
        if stride is None:
            if self.eval.context is not None:
                raise ValueError("eval.context: goes with eval.stride, which is not given")
            return
        if longest is not None and self.eval_context > longest:
            raise ValueError(
                f"eval.context: {self.eval_context} is longer than the position table, "
                f"model.max_seq_len={longest}"
            )
        if self.eval_context % stride:
            raise ValueError(
                f"eval.stride: {stride} does not divide the context of {self.eval_context} tokens"
            )

    @property
    def eval_context(self) -> int:
        """Tokens in a window of the second held-out score."""
        return self.eval.context or self.data.seq_len

    def _check_zero(self) -> None:
        zero = self.deepspeed.zero_optimization
        if self.train.precision == "fp16" and zero.stage == 0:
            raise ValueError(
                "train.precision: fp16 needs deepspeed.zero_optimization.stage 1, 2 or 3, given 0"
            )
        if self.train.compile and zero.stage == 3:
            raise ValueError(
                "train.compile: expected deepspeed.zero_optimization.stage 0, 1 or 2, given 3: "
                "gathering weights splits every graph"
            )
        if zero.offload_optimizer and (zero.stage == 0 or self.optim.name == "muon"):
            raise ValueError(
                "deepspeed.zero_optimization.offload_optimizer: expected stage 1, 2 or 3 and "
                f"optim.name adamw, given stage {zero.stage} and {self.optim.name}"
            )
        if zero.offload_optimizer == "nvme" and (zero.stage < 3 or not zero.offload_folder):
            raise ValueError(
                "deepspeed.zero_optimization.offload_optimizer: nvme needs stage 3 and "
                f"offload_folder, given stage {zero.stage} and {zero.offload_folder}"
            )
        if zero.offload_param and zero.stage < 3:
            raise ValueError(
                f"deepspeed.zero_optimization.offload_param: expected stage 3, given {zero.stage}"
            )
        if zero.zero_hpz_partition_size and (zero.stage < 3 or zero.offload_param):
            raise ValueError(
                "deepspeed.zero_optimization.zero_hpz_partition_size: expected stage 3 without "
                f"offload_param, given stage {zero.stage} and {zero.offload_param}"
            )

    def accumulation_steps(self, world_size: int) -> int:
        """Forward passes that one rank makes for one optimizer step after the last phase.

        Raises ConfigError, naming the world sizes that would do, when ``world_size`` does not
        divide the batch of any phase.
        """
        micro = self.train.micro_batch_size
        for rows in dict.fromkeys(phase.batch_size for phase in self.data.all_phases):
            micro_batches, rest = divmod(rows, micro)
            assert rest == 0
            if micro_batches % world_size:
                good = [n for n in range(1, micro_batches + 1) if micro_batches % n == 0]
                raise ConfigError(
                    f"data.batch_size: {rows} rows in micro batches of {micro} cannot be divided "
                    f"among {world_size} ranks; world sizes that can: {', '.join(map(str, good))}"
                )
        return self.data.batch_size // micro // world_size


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a file, or the shipped settings of a bare name, and apply ``key=value`` overrides.

    Raises ConfigError with one line for every mistake.
    """
    path = shipped.find(path)
    settings = read_yaml(path)
    keys = [override.partition("=")[0] for override in overrides]
    for key in keys:
        if keys.count(key) > 1:
            raise ConfigError(f"command line: {key}: given {keys.count(key)} times")
    changed = [apply_override(settings, override) for override in overrides]
    return parse(Config, settings, source=str(path), overridden=changed)
