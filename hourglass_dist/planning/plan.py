"""What a run will cost before it is started: memory, operations and traffic of one rank.

In names: P trained parameters, W ranks. Bytes of P as DeepSpeed 0.19.8 keeps them, between the
passes of a step; ``tests.measure.zero`` measures them, and what a rank sends:

    stage  precision  weights  gradients    master    moments
    0      both       4 P      4 P          -         8 P
    1      fp32       4 P      4 P          4 P / W   8 P / W
    1      bf16       2 P      2 P + 4 P    4 P / W   8 P / W    (the sum of micro batches is fp32)
    2      fp32       4 P      4 P / W      4 P / W   8 P / W
    2      bf16       2 P      4 P / W      4 P / W   8 P / W
    3      fp32       4 P / W  4 P / W      4 P / W   8 P / W
    3      bf16       2 P / W  4 P / W      4 P / W   8 P / W

On top, at most, while gradients are reduced (R is ``reduce_bucket_size``, or P where that is less,
b bytes of a weight):

    0        both   a flat copy of the gradients, 4 P, of 500 M elements at most
    1        bf16   a copy in fp32 and one in bf16, 6 P, of as many
    1        fp32   R b, and this rank's 4 P / W beside the whole gradients
    2        both   R b (twice with ``overlap_comm``) and a copy of that; in fp32 a second 4 P / W
                    where micro batches are summed
    3        both   the same buffers, and the gathered weights that stay between the passes

A rank sends, with rings:

    0, 1   one all-reduce of the gradients a step;  1 also one all-gather of the weights
    2      one all-reduce a micro batch, one all-gather of the weights a step
    3      two all-gathers of the weights and one reduce-scatter of the gradients a micro batch;
           what the forward pass used last stays for the backward pass and is gathered once: as
           many elements as ``stage3_max_live_parameters``, and at least 500 M (half of DeepSpeed's
           default of ``stage3_max_reuse_distance``)

With ``zero_hpz_partition_size`` G each weight is gathered from all ranks once a step, and from then
on from a second copy among G ranks, which takes b P / G on top until the step is over.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.table import Table

from hourglass_dist.config.schema import Config
from hourglass_dist.engine.optim import is_muons
from hourglass_dist.model.hourglass import HourglassLM
from hourglass_dist.model.settings import ModelConfig
from hourglass_dist.planning.cost import LevelCost, ModelCost, choose_checkpointing, model_cost

MASTER_BYTES, MOMENT_BYTES, SUM_BYTES = 4, 8, 4
"""Of one parameter: the fp32 weight, AdamW's two moments in fp32, the fp32 sum of its gradients."""
REDUCE_BUCKET, MAX_LIVE_PARAMETERS, REUSE_DISTANCE = 500_000_000, 1_000_000_000, 1_000_000_000
"""DeepSpeed's defaults, in elements."""
SUB_GROUP, SWAP_BUFFERS = 1_000_000_000, 4
"""DeepSpeed's defaults: elements that are stepped at a time, and buffers of so many (weights,
gradients, two moments) for those whose state is in files."""
FLAT_COPY = 500_000_000
"""Elements that stage 0, and stage 1 in bf16, reduce at a time: a constant of DeepSpeed's."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank in a training step."""

    weights: int
    gradients: int
    master: int
    """fp32 copies of the weights, in the optimizer."""
    moments: int
    gathered: int
    """At most: weights of other ranks that are here for the moment, and hpZ's second copy."""
    buffer: int
    """At most: where gradients wait for their reduction, and copies of them; and what is stepped at
    a time, where its state is in files."""
    activations: int
    """Of one micro batch."""
    host: int = 0
    """How much of this lies in the host's memory, where the settings say so."""
    files: int = 0
    """How much of this lies in files between steps, and in nobody's memory."""

    @property
    def total(self) -> int:
        """All of it on the device."""
        return (
            self.weights
            + self.gradients
            + self.master
            + self.moments
            + self.gathered
            + self.buffer
            + self.activations
            - self.host
            - self.files
        )


@dataclass(frozen=True)
class Plan:
    """A run, its model's cost and that of one of its ranks."""

    config: Config
    model: ModelConfig
    """The model with activation checkpointing chosen where ``config`` says ``auto``."""
    world_size: int
    micro_batches: int
    """Of one rank, in one optimizer step."""
    cost: ModelCost
    memory: RankMemory
    traffic: int
    """Bytes that one rank sends in one optimizer step."""
    gathered_after: int
    """How many of these when it has changed its part of the weights, so that all have all."""
    gathered_inside: int
    """How many of these inside a group of ``zero_hpz_partition_size`` ranks."""

    @property
    def checkpoint_bytes(self) -> int:
        """Of one checkpoint, all ranks together: fp32 weights and moments, frozen weights."""
        trained = self.cost.trained_parameters
        return (MASTER_BYTES + MOMENT_BYTES) * trained + 4 * (self.cost.parameters - trained)

    @property
    def tokens_per_step(self) -> int:
        """Over all ranks, in a step after the last phase."""
        return self.config.data.batch_size * self.config.data.seq_len

    @property
    def tokens(self) -> int:
        """Of the whole run."""
        return self.config.data.tokens(self.config.train.steps)

    @property
    def training_flops(self) -> float:
        """Of the whole run, without recomputation; as if all rows were of the longest length."""
        return self.tokens * self.cost.training_flops_per_token


def plan(config: Config, world_size: int) -> Plan:
    """The cost of ``config`` on ``world_size`` ranks.

    Raises ConfigError when batch or weights cannot be dealt to that many ranks, ValueError when
    activations do not fit ``train.activation_memory`` whatever is recomputed.
    """
    micro_batches = config.accumulation_steps(world_size)
    model = settle_checkpointing(config)
    cost = model_cost(
        model,
        config.data.longest,
        rows=config.train.micro_batch_size,
        bytes_per_number=_number_bytes(config),
        packed=config.data.isolate_documents,
    )
    return Plan(
        config=config,
        model=model,
        world_size=world_size,
        micro_batches=micro_batches,
        cost=cost,
        memory=_memory(config, cost, world_size, micro_batches),
        traffic=_traffic(config, cost.trained_parameters, world_size, micro_batches),
        gathered_after=_gathered_after(config, cost.trained_parameters, world_size),
        gathered_inside=_gathered_inside(
            config, cost.trained_parameters, world_size, micro_batches
        )[1],
    )


def too_large(config: Config, world_size: int) -> str:
    """What to tell a user whose run does not fit the memory of a rank: the plan, and the cheapest
    ways out."""
    made = plan(config, world_size)
    memory, micro = made.memory, config.train.micro_batch_size
    ways = []
    if micro > 1:
        ways.append(f"train.micro_batch_size={micro // 2} (the same batch, half the activations)")
    for index, level in enumerate(made.model.levels):
        if level.activation_checkpointing == "none" and len(ways) < 2:
            ways.append(f"model.levels.{index}.activation_checkpointing=full")
    if config.deepspeed.stage < 3:
        stage = config.deepspeed.stage + 1
        ways.append(f"deepspeed.zero_optimization.stage={stage}, or more ranks")
    else:
        ways.append("more ranks")
    return (
        f"out of memory in a step of {micro} x {config.data.longest} tokens on a rank; the plan is "
        f"{show_bytes(memory.total)}: {show_bytes(memory.activations)} of activations, "
        f"{show_bytes(memory.total - memory.activations)} of weights, gradients and optimizer. "
        f"The cheapest ways out: {'; '.join(ways)}"
    )


def settle_checkpointing(config: Config) -> ModelConfig:
    """The model of a run with activation checkpointing chosen where it says ``auto``.

    Raises ValueError when nothing fits ``train.activation_memory``.
    """
    return choose_checkpointing(
        config.model,
        config.data.longest,
        rows=config.train.micro_batch_size,
        bytes_per_number=_number_bytes(config),
        packed=config.data.isolate_documents,
        budget=int((config.train.activation_memory or 0) * 2**30),
    )


def _number_bytes(config: Config) -> int:
    """Of an activation."""
    return 4 if config.train.precision == "fp32" else 2


def _weight_bytes(config: Config) -> int:
    """Of one weight as the forward pass uses it; stage 0 in bf16 is autocast over fp32 weights."""
    return 2 if config.train.precision != "fp32" and config.deepspeed.stage > 0 else 4


def _memory(config: Config, cost: ModelCost, world_size: int, micro_batches: int) -> RankMemory:
    zero = config.deepspeed.zero_optimization
    memory = _memory_anywhere(config, cost, world_size, micro_batches)
    host = memory.weights if zero.offload_param else 0
    if not zero.offload_optimizer:
        return replace(memory, host=host)
    host += memory.gradients if zero.stage >= 2 else 0  # they wait there for the step, too
    kept = memory.master + memory.moments
    if zero.offload_optimizer == "cpu":
        return replace(memory, host=host + kept)
    share = -(-cost.trained_parameters // world_size)
    stepped = SWAP_BUFFERS * SUM_BYTES * min(zero.sub_group_size or SUB_GROUP, share)
    return replace(memory, host=host + stepped, buffer=memory.buffer + stepped, files=kept)


def _memory_anywhere(
    config: Config, cost: ModelCost, world_size: int, micro_batches: int
) -> RankMemory:
    stage, weight_bytes = config.deepspeed.stage, _weight_bytes(config)
    trained = cost.trained_parameters
    share = -(-trained // world_size)
    summed_apart = stage == 1 and weight_bytes < SUM_BYTES
    group = config.deepspeed.group_size(world_size)
    second_copy = -(-cost.parameters // group) if group else 0
    return RankMemory(
        weights=weight_bytes
        * (-(-cost.parameters // world_size) if stage == 3 else cost.parameters),
        gradients=SUM_BYTES * (share if stage >= 2 else trained)
        + (weight_bytes * trained if summed_apart else 0),
        master=MASTER_BYTES * share if stage > 0 else 0,
        moments=_moments(config, cost) // (world_size if stage > 0 else 1),
        gathered=weight_bytes * (staying(config, cost.parameters) + second_copy),
        buffer=_reduction_bytes(config, trained, share, micro_batches),
        activations=cost.activation_bytes,
    )


def _moments(config: Config, cost: ModelCost) -> int:
    """Of all trained parameters; Muon keeps one number of a parameter, not two."""
    muons = 0
    if config.optim.name == "muon":
        with torch.device("meta"):
            named = HourglassLM(settle_checkpointing(config)).named_parameters()
        muons = sum(p.numel() for name, p in named if is_muons(name, p.shape, config.optim))
    return MOMENT_BYTES * cost.trained_parameters - (MOMENT_BYTES // 2) * muons


def _reduction_bytes(config: Config, trained: int, share: int, micro_batches: int) -> int:
    stage, weight_bytes = config.deepspeed.stage, _weight_bytes(config)
    zero = config.deepspeed.zero_optimization
    if stage == 0:
        return SUM_BYTES * min(trained, FLAT_COPY)
    if stage == 1 and weight_bytes < SUM_BYTES:
        return (SUM_BYTES + weight_bytes) * min(trained, FLAT_COPY)
    bucket = reduce_bucket(config, trained)
    if stage == 1:  # gradients move into the bucket
        return bucket * weight_bytes + SUM_BYTES * share
    filling = 2 if zero.overlap_comm else 1  # one is filled while the other is reduced
    waiting = bucket * filling if zero.contiguous_gradients is not False else 0
    summed_beside = stage == 2 and weight_bytes == SUM_BYTES and micro_batches > 1
    return (waiting + bucket) * weight_bytes + SUM_BYTES * share * summed_beside


def reduce_bucket(config: Config, trained: int) -> int:
    """Elements reduced at a time: not more than are trained, because DeepSpeed makes a buffer of so
    many, 1 or 2 GB by default, for the smallest model, too."""
    return min(config.deepspeed.zero_optimization.reduce_bucket_size or REDUCE_BUCKET, trained)


def _traffic(config: Config, trained: int, world_size: int, micro_batches: int) -> int:
    # In units of (W - 1) / W times all elements: an all-reduce is 2, the other two are 1.
    inside, sent_inside = _gathered_inside(config, trained, world_size, micro_batches)
    elements = {
        0: 2 * trained,
        1: (2 + 1) * trained,
        2: (2 * micro_batches + 1) * trained,
        3: (3 * trained - staying(config, trained)) * micro_batches - inside,
    }[config.deepspeed.stage]
    return _weight_bytes(config) * elements * (world_size - 1) // world_size + sent_inside


def _gathered_inside(
    config: Config, trained: int, world_size: int, micro_batches: int
) -> tuple[int, int]:
    """Elements gathered inside groups of hpZ in a step, all but the first gathering of each weight,
    and the bytes that a rank sends there."""
    group = config.deepspeed.group_size(world_size)
    if group is None:
        return 0, 0
    elements = (2 * trained - staying(config, trained)) * micro_batches - trained
    return elements, _weight_bytes(config) * elements * (group - 1) // group


def _gathered_after(config: Config, trained: int, world_size: int) -> int:
    sent = _weight_bytes(config) * trained if config.deepspeed.stage in (1, 2) else 0
    return sent * (world_size - 1) // world_size


def staying(config: Config, parameters: int) -> int:
    """Elements that stay gathered from the forward to the backward pass: at stage 3, else none."""
    if config.deepspeed.stage < 3:
        return 0
    live = config.deepspeed.zero_optimization.stage3_max_live_parameters or MAX_LIVE_PARAMETERS
    return min(parameters, max(live, REUSE_DISTANCE // 2))


def render(plan: Plan) -> str:
    """The plan as text, 100 columns wide."""
    out = io.StringIO()
    console = Console(file=out, width=100, highlight=False)
    for part in describe(plan):
        console.print(part)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def describe(plan: Plan) -> list[str | Table]:
    """Return the plan as lines of text and tables."""
    return [_headline(plan), _level_table(plan), _rank_table(plan), _summary(plan)]


def _headline(plan: Plan) -> str:
    config = plan.config
    return (
        f"{config.model.hierarchy}, {_widths(config.model)}: "
        f"{plan.cost.parameters:,} parameters, rows of {config.data.longest} tokens, "
        f"{config.train.precision}, ZeRO-{config.deepspeed.stage}, ranks: {plan.world_size}"
    )


def _widths(model: ModelConfig) -> str:
    widths = [level.dim for level in model.levels]
    if len(set(widths)) == 1:
        return f"width {widths[0]}"
    return "widths " + ", ".join(map(str, widths))


def _level_table(plan: Plan) -> Table:
    cost = plan.cost
    table = Table(title="Model", title_justify="left")
    table.add_column("level")
    for name in ("stride", "parameters", "FLOPs/token", "share", "activations"):
        table.add_column(name, justify="right")
    table.add_column("checkpointing")
    for part, policy in zip(cost.parts, [*plan.model.checkpointing, ""], strict=True):
        table.add_row(*_level_row(part, cost), policy)
    largest = max(cost.parts, key=lambda part: part.transient_bytes)
    name = "loss, for a moment" if largest is cost.ends else "one recomputed layer"
    table.add_row(name, "", "", "", "", show_bytes(largest.transient_bytes))
    table.add_section()
    total = f"{cost.parameters:,}", show_count(cost.flops_per_token), "100.0 %"
    table.add_row("all", "", *total, show_bytes(cost.activation_bytes))
    return table


def _level_row(part: LevelCost, cost: ModelCost) -> list[str]:
    flops = part.flops / cost.length
    return [
        "embeddings, output" if part is cost.ends else part.name,
        str(part.stride),
        f"{part.parameters:,}",
        show_count(flops),
        f"{flops / cost.flops_per_token:.1%}".replace("%", " %"),
        show_bytes(part.activation_bytes),
    ]


def _rank_table(plan: Plan) -> Table:
    memory = plan.memory
    table = Table(title="One rank", title_justify="left")
    table.add_column("memory")
    table.add_column("bytes", justify="right")
    rows = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer: fp32 weights": memory.master,
        "optimizer: moments": memory.moments,
        "gathered weights": memory.gathered,
        "buffers": memory.buffer,
        "activations": memory.activations,
    }
    for name, value in rows.items():
        table.add_row(name, show_bytes(value))
    table.add_section()
    if memory.host:
        table.add_row("in the host's memory", show_bytes(memory.host))
    if memory.files:
        table.add_row("in files", show_bytes(memory.files))
    table.add_row("in all on the device" if memory.host else "in all", show_bytes(memory.total))
    return table


def _summary(plan: Plan) -> str:
    cost, config = plan.cost, plan.config
    hardware = cost.hardware_flops_per_token
    recomputed = f", {show_count(hardware)} with recomputation" if _recomputes(cost) else ""
    return (
        f"A step: {plan.tokens_per_step:,} tokens; each rank runs {plan.micro_batches} x "
        f"{config.train.micro_batch_size} rows and sends {show_bytes(plan.traffic)}.\n"
        f"A token: {show_count(cost.training_flops_per_token)} FLOPs forward and backward"
        f"{recomputed}.\n"
        f"The run: {config.train.steps:,} steps, {show_count(plan.tokens)} tokens, "
        f"{show_count(plan.training_flops)} FLOPs."
    )


def _recomputes(cost: ModelCost) -> bool:
    return cost.recompute_flops > 0


def show_bytes(count: int) -> str:
    """Bytes in the largest binary unit that leaves at least 1: ``1.5 MiB``."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.2f} {units[0]}"


def show_count(count: float) -> str:
    """A count with three digits: ``1.05 T``."""
    for power, unit in enumerate(("", " k", " M", " G", " T", " P", " E")):
        if count < 1000 ** (power + 1):
            return f"{count / 1000**power:.3g}{unit}"
    return f"{count / 1000**7:.3g} Z"
