"""Every setting of a run, in typed, documented, frozen sections, and ``load``.

A run is described by ``CONFIG key=value ...``; the rules of reading are in ``config/loader.py``.
It imports no torch, no deepspeed and no data code, so importing it is cheap.
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
    """Folder, seed and limits of a run."""

    dir: str
    """Run folder. It holds settings, checkpoints, TensorBoard events and metrics.jsonl."""
    seed: int = Field(default=1337, ge=0)
    """Random seed of the initial weights, of dropout and of the order of the data."""
    time_limit_hours: PositiveFloat | None = None
    """Hours until the run saves and exits with code 75. Choose less than the scheduler's limit."""
    hang_minutes: PositiveFloat = 10.0
    """Minutes without a step (or a batch of an evaluation) after which every rank writes its stacks
    into the run folder and ends. A lost network is noticed no earlier. Must exceed the time of a
    save. The start has at least ten minutes."""
    max_fruitless_starts: PositiveInt = 8
    """Number of consecutive starts that crash without saving progress after which the run is not
    started again. This ends endless automatic restarts."""


class OptimConfig(Section):
    """The optimizer and its learning-rate schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """Optimizer. ``muon``: Muon for the matrices between embeddings and output layer, AdamW for the
    rest, at the same learning rate."""
    lr: PositiveFloat
    """Peak learning rate."""
    level_lr: list[PositiveFloat] | None = None
    """Factors of the learning rate, one for each level, outermost level first. The outermost level
    includes embeddings and output layer."""
    schedule: Literal["cosine", "linear", "wsd"] = "cosine"
    """Schedule after the linear warm-up. ``cosine``: half a cosine down to the minimum. ``linear``:
    a straight line down to it. ``wsd``: constant, then a linear decay at the end."""
    warmup_steps: int = Field(default=0, ge=0)
    """Number of optimizer steps of linear warm-up."""
    decay_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    """Fraction of all steps that the final decay of ``wsd`` takes."""
    min_lr_ratio: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1
    """Minimum learning rate, as a fraction of the peak."""
    beta1: Fraction = 0.9
    """Decay rate of the first moment."""
    beta2: Fraction = 0.95
    """Decay rate of the second moment."""
    eps: PositiveFloat = 1e-8
    """Constant that is added to the square root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.1
    """Decoupled weight decay of matrices. Embeddings, norms and biases have none."""
    clip_grad_norm: Annotated[float, Field(ge=0.0)] = 1.0
    """Maximum global gradient norm; 0 disables clipping."""


class SpikeConfig(Section):
    """Detection of loss spikes, and the return to a checkpoint that follows."""

    sigmas: PositiveFloat = 6.0
    """Threshold of a spike: standard deviations above the window's mean, three losses in a row."""
    window: Annotated[int, Field(ge=8)] = 64
    """Number of losses in the window of mean and deviation; those above the threshold are left
    out."""
    most: PositiveInt = 3
    """Maximum number of returns to the last checkpoint. Each skips the batches read since then."""


class TrainConfig(Section):
    """Length, micro batch size, precision and limits of training."""

    steps: PositiveInt
    """Number of optimizer steps of the whole run."""
    micro_batch_size: PositiveInt
    """Rows in one forward pass of one rank. The number of accumulation steps follows from
    data.batch_size and the world size."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """``bf16``: bf16 weights with fp32 master weights at ZeRO stages 1-3, autocast at stage 0.
    ``fp16``: the same in fp16 with a dynamic loss scale, at stages 1-3, for GPUs without bf16."""
    compile: bool = False
    """Whether torch.compile compiles the training passes of every layer (ZeRO stages 0 to 2; a CPU
    needs a C++ compiler). It takes time before the first step and for every new length."""
    init_from: str | None = None
    """Export whose weights initialize a new run. Its model and tokenizer must be the run's own."""
    max_skipped_steps: PositiveInt = 8
    """Number of consecutive steps with a NaN or infinite loss or gradient that ends the run. Such a
    step changes nothing."""
    spikes: SpikeConfig | None = None
    """Return to a checkpoint and skipping of batches at a loss spike. null: training continues."""
    activation_memory: PositiveFloat | None = None
    """Memory for the activations of one micro batch on one rank, GiB. It decides which levels with
    ``activation_checkpointing: auto`` are checkpointed."""


class EvalConfig(Section):
    """Evaluation on the held-out split."""

    every: PositiveInt
    """Optimizer steps between evaluations; the last step is always evaluated."""
    batch_size: PositiveInt
    """Rows in one forward pass of one rank."""
    stride: PositiveInt | None = None
    """Tokens between the windows of a second score at the end of the run. Every target then has at
    least ``context - stride`` tokens before it. Takes context / stride times as long as the usual
    score. Must divide the context and the shards' block size. null: no second score."""
    context: PositiveInt | None = None
    """Tokens in a window of that second score. null: data.seq_len."""
    samples: int = Field(default=0, ge=0)
    """Number of short texts that the model generates at every evaluation. The main rank then holds
    all weights, also at ZeRO-3."""
    prompts: list[str] = Field(default_factory=list)
    """Prompts of these texts, used in turn. Empty: the first rows of the held-out text."""


class CheckpointConfig(Section):
    """Saving of checkpoints."""

    every: PositiveInt
    """Optimizer steps between checkpoints; the last step is always saved."""
    keep: PositiveInt = 2
    """Number of the newest checkpoints that stay on disk."""
    keep_every: PositiveInt | None = None
    """Interval of checkpoints that are never removed, optimizer steps."""
    keep_best: bool = False
    """Whether the evaluated checkpoint with the lowest held-out bits per byte is kept as well."""
    remote: str | None = None
    """Address of remote copies, such as s3://bucket/runs/NAME. A run whose folder is missing
    resumes from there."""


class MetricsConfig(Section):
    """Metrics, their writers, and the profiler."""

    every: PositiveInt = 10
    """Optimizer steps between console lines and metric records."""
    writers: list[Literal["tensorboard", "wandb", "mlflow"]] = Field(default=["tensorboard"])
    """Destinations of records besides metrics.jsonl. ``wandb`` and ``mlflow`` must be installed,
    and take project and server from their own environment variables."""
    profile_steps: Annotated[list[PositiveInt], Field(min_length=2, max_length=2)] | None = None
    """First and last optimizer step (1 is the first of a run) that is profiled. A trace and a table
    of time by level are written to ``profile/`` of the run folder."""

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
        """``profile_steps`` as the pair (first, last), or None."""
        return (self.profile_steps[0], self.profile_steps[1]) if self.profile_steps else None


class ZeroConfig(Section):
    """DeepSpeed's ``zero_optimization`` block, limited to keys tested with our state files.

    Other keys are refused, as some change where DeepSpeed keeps weights (``round_robin_gradients``
    was seen to make wrong checkpoints). null is DeepSpeed's default.
    """

    stage: Literal[0, 1, 2, 3] = 1
    """ZeRO stage. 0 shards nothing, 1 the optimizer state, 2 also gradients, 3 also weights."""
    overlap_comm: bool | None = None
    """Whether gradients are reduced during the backward pass."""
    contiguous_gradients: bool | None = None
    """Whether gradients are copied into one buffer as they are computed."""
    reduce_bucket_size: PositiveInt | None = None
    """Number of gradient elements in one reduction."""
    allgather_bucket_size: PositiveInt | None = None
    """Number of weight elements in one all-gather (stages 1 and 2)."""
    stage3_prefetch_bucket_size: PositiveInt | None = None
    """Number of weight elements that are gathered ahead of their use (stage 3)."""
    stage3_param_persistence_threshold: Annotated[int, Field(ge=0)] | None = None
    """Number of elements below which a weight stays whole on every rank (stage 3)."""
    stage3_max_live_parameters: PositiveInt | None = None
    """Maximum number of weight elements that are gathered at a time (stage 3)."""
    zero_hpz_partition_size: Annotated[int, Field(ge=2)] | None = None
    """Number of ranks, those of a node, that keep a second copy of all weights among them. Only the
    first gathering of a step goes beyond them (stage 3; ZeRO++'s hpZ, arXiv 2306.10209)."""
    offload_optimizer: Literal["cpu", "nvme"] | None = None
    """``cpu``: master weights and moments are kept, and stepped, in host memory (stages 1 to 3).
    ``nvme``: they are kept in files between steps (stage 3)."""
    offload_folder: str | None = None
    """Folder of the ``nvme`` files, on a fast disk of every machine. They take 12 bytes for each
    parameter of the machine's ranks, under a path made of ``run.dir``."""
    sub_group_size: PositiveInt | None = None
    """Number of elements that a rank updates at a time (stage 3). ``nvme`` keeps four copies of
    them in host memory, 4 bytes each; groups of fewer than 262,144 elements stay in host memory."""
    offload_param: Literal["cpu"] | None = None
    """``cpu``: this rank's part of the weights is kept in host memory (stage 3)."""


class DeepSpeedConfig(Section):
    """Settings that are passed through to DeepSpeed.

    Batch sizes, clipping and precision follow from the other sections.
    """

    zero_optimization: ZeroConfig = ZeroConfig()

    @property
    def stage(self) -> int:
        """ZeRO stage, 0 to 3."""
        return self.zero_optimization.stage

    def group_size(self, world_size: int) -> int | None:
        """Return the number of ranks that share a second copy of the weights; None without one.

        Raises ConfigError for a ``world_size`` that is larger than a group and not whole groups.
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
        """Return the number of forward passes of one rank for one optimizer step of the last phase.

        Raises ConfigError, naming the possible world sizes, when ``world_size`` does not divide the
        batch of any phase into whole micro batches.
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
    """Read a settings file, or the shipped one of a bare name, and apply ``key=value`` overrides.

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
