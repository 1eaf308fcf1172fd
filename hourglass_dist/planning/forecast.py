"""Memory, time and cost of a run on given machines, and a search for the fastest settings.

A forecast is computed from the plan and from data sheets, under these assumptions; the main ones
are printed with it:

    memory        the plan's, 5 % of it for fragmentation, and 1 GiB for the GPU context
    products      at 40 % of the peak (published: 33 to 48 % on H100, llm-foundry, Megatron-LM and
                  torchtitan), with selective checkpointing 3 % longer (docs/benchmarks/cpu.md)
    collectives   rings over all links of a node at 70 % of their bandwidth; between nodes every
                  GPU uses its own network card; each also takes the latencies of its steps
                  (collective_times.py); DeepSpeed's bucket sizes decide their number
    files         2 GB/s to the file system of the checkpoints, all ranks together
    failures      the rate of the training of Llama 3 (failures.py)
    a step        with ``overlap_comm`` (stages 2 and 3) the longer of both, else their sum; then
                  the optimizer, which reads and writes its state once, and at stages 1 and 2 the
                  all-gather of the new weights
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from hourglass_dist.config.loader import ConfigError
from hourglass_dist.config.schema import Config
from hourglass_dist.engine.deepspeed_config import reduce_bucket
from hourglass_dist.planning.collective_times import all_reduce_s, ring_s
from hourglass_dist.planning.devices import Device, Node, planned_device
from hourglass_dist.planning.failures import RATES, Saving, mtbf_s
from hourglass_dist.planning.plan import AUTOMATIC, Plan, plan
from hourglass_dist.planning.zero import FLAT_COPY, staying

CONTEXT, FRAGMENTS = 2**30, 0.05
PRODUCTS, LINKS, SELECTIVE = 0.40, 0.70, 1.03
EXACT = 0.05
WRITES = 2e9
"""Write bandwidth of the file system of the checkpoints, all ranks together, bytes per second."""
HOST_LINK = 25e9
"""Bandwidth from an accelerator to its host, bytes per second; training stalls for this copy (PCIe
4.0 x16 has 32e9)."""
GATHER_BUCKET, PREFETCH_BUCKET, PERSISTENCE = 500_000_000, 50_000_000, 100_000
"""DeepSpeed's default bucket sizes and parameter persistence threshold, elements."""
MOST_MICRO_BATCHES = 12
"""Number of micro batch sizes that are tried, the smallest ones."""


@dataclass(frozen=True)
class Cluster:
    """Identical nodes of identical accelerators."""

    device: Device
    node: Node
    nodes: int
    gpus_per_node: int
    price: float | None
    """Price of one accelerator, dollars per hour."""

    @property
    def gpus(self) -> int:
        """Number of accelerators in all nodes."""
        return self.nodes * self.gpus_per_node

    @property
    def bandwidth(self) -> float:
        """Bandwidth of one accelerator in a collective over all, bytes per second."""
        return self.bandwidth_between(self.nodes)

    def bandwidth_between(self, nodes: int) -> float:
        """Return the bandwidth in a collective over ``nodes`` nodes, bytes per second."""
        inside, outside = self.node.inside, self.node.outside * self.gpus_per_node
        return LINKS * (min(inside, outside) if nodes > 1 else inside)


def cluster(gpu: str, nodes: int, gpus_per_node: int, price: float | None = None) -> Cluster:
    """Return machines by the name of their accelerator; ``price`` replaces the listed price.

    Raises ValueError for an unknown name.
    """
    device, node = planned_device(gpu)
    return Cluster(device, node, nodes, gpus_per_node, node.price if price is None else price)


@dataclass(frozen=True)
class Forecast:
    """Memory, time and cost of a plan on a cluster."""

    plan: Plan
    cluster: Cluster

    @property
    def memory(self) -> float:
        """Memory needed on one accelerator, bytes."""
        return self.plan.memory.total * (1 + FRAGMENTS) + CONTEXT

    @property
    def fits(self) -> bool:
        """Whether the accelerator has enough memory."""
        return self.memory <= self.cluster.node.memory

    @property
    def products_s(self) -> float:
        """Time of matrix products in a step, seconds."""
        fp32 = self.plan.config.train.precision == "fp32"
        device, node = self.cluster.device, self.cluster.node
        peak = node.fp32_flops if fp32 else device.bf16_flops
        again = SELECTIVE if "selective" in self.plan.config.model.checkpointing else 1.0
        operations = self.plan.tokens_per_step * self.plan.flops.hardware_per_token
        return again * operations / self.cluster.gpus / (PRODUCTS * peak)

    @property
    def calls(self) -> list[Calls]:
        """Collectives during the forward and backward passes of a step."""
        made, zero = self.plan, self.plan.config.deepspeed.zero_optimization
        trained = made.parameters.trained
        sent = made.traffic.total - made.traffic.after - made.traffic.inside
        bucket = reduce_bucket(made.config, trained)
        if zero.stage < 3:
            at_once = bucket if zero.stage == 2 else FLAT_COPY
            passes = made.micro_batches if zero.stage == 2 else 1
            return [Calls("all-reduce", passes * -(-trained // at_once), sent)]
        moved = 3 * trained - staying(made.config, trained)  # gathered, gathered again, reduced
        ahead = zero.stage3_prefetch_bucket_size or PREFETCH_BUCKET
        # the forward pass gathers in halves of a bucket, in the order of a layer's tensors
        gathers = made.micro_batches * max(1, round(moved / ahead))
        reduces = made.micro_batches * -(-trained // bucket)
        if group := made.config.deepspeed.group_size(made.world_size):
            first = max(1, round(2 * trained / ahead))
            reduced = sent * made.micro_batches / (made.micro_batches + 1)
            again = Calls("all-gather", max(1, gathers - first), made.traffic.inside, group)
            around = Calls("all-gather", first, sent - reduced)
            return [around, again, Calls("reduce-scatter", reduces, reduced)]
        reduced = sent * trained / moved
        return [
            Calls("all-gather", gathers, sent - reduced),
            Calls("reduce-scatter", reduces, reduced),
        ]

    @property
    def calls_after(self) -> list[Calls]:
        """Collectives after the update of the weights."""
        made, zero = self.plan, self.plan.config.deepspeed.zero_optimization
        if zero.stage in (1, 2):
            at_once = zero.allgather_bucket_size or GATHER_BUCKET
            count = -(-made.parameters.trained // at_once)
            return [Calls("all-gather", count, made.traffic.after)]
        least = zero.stage3_param_persistence_threshold
        small = PERSISTENCE if least is None else least
        count = made.parameters.small_tensors(small) if zero.stage == 3 else 0
        return [Calls("all-gather", count, 0.0)] if count else []

    @property
    def collectives_s(self) -> float:
        """Time of collectives during the forward and backward passes of a step, seconds."""
        return sum(self._seconds(calls) for calls in self.calls)

    def _seconds(self, calls: Calls) -> float:
        machines = self.cluster
        if machines.gpus == 1:
            return 0.0
        time = all_reduce_s if calls.kind == "all-reduce" else ring_s
        each, ranks = calls.sent / calls.number, calls.ranks or machines.gpus
        nodes = -(-ranks // machines.gpus_per_node)
        return calls.number * time(each, ranks, nodes, machines.bandwidth_between(nodes))

    @property
    def optimizer_s(self) -> float:
        """Time from the last gradient until all ranks have the new weights, seconds."""
        memory = self.plan.memory
        weights = memory.moments / 2  # in fp32, of this rank
        moved = 2 * (memory.moments + weights) + weights  # read and written; gradients are read
        gathering = sum(self._seconds(calls) for calls in self.calls_after)
        return moved / self.cluster.node.memory_bandwidth + gathering

    @property
    def overlaps(self) -> bool:
        """Whether communication overlaps with computation; DeepSpeed's default at stage 3."""
        zero = self.plan.config.deepspeed.zero_optimization
        default = zero.stage == 3
        return zero.stage >= 2 and (default if zero.overlap_comm is None else zero.overlap_comm)

    @property
    def step_s(self) -> float:
        """Time of a step after the last phase, seconds."""
        join = max if self.overlaps else lambda *both: sum(both)
        return float(join(self.products_s, self.collectives_s)) + self.optimizer_s

    @property
    def saving(self) -> Saving:
        """Time that a checkpoint takes: a copy to the host, then the write."""
        size = self.plan.checkpoint_bytes
        return Saving(size / self.cluster.gpus / HOST_LINK, size / WRITES)

    @property
    def mtbf_s(self) -> float:
        """Mean time between failures, seconds."""
        return mtbf_s(self.cluster.gpus, RATES["Llama 3"])

    @property
    def tokens_per_day(self) -> float:
        """Tokens per day over all accelerators."""
        return self.plan.tokens_per_step / self.step_s * 86400

    @property
    def gpu_hours(self) -> float:
        """GPU-hours of the whole run without evaluations and checkpoints."""
        return self.plan.tokens / self.tokens_per_day * 24 * self.cluster.gpus


class Calls(NamedTuple):
    """Collectives of one kind."""

    kind: str
    number: int
    sent: float
    """Bytes that a rank sends in all these collectives."""
    ranks: int = 0
    """Ranks in each collective; 0 for all."""


def forecast(config: Config, machines: Cluster) -> Forecast:
    """Return the forecast of a run. Raises ConfigError when the batch cannot be divided among the
    accelerators, ValueError when activations exceed ``train.activation_memory``."""
    return Forecast(plan(config, machines.gpus, "cuda"), machines)


def candidates(config: Config, machines: Cluster) -> Iterator[Forecast]:
    """Yield forecasts for all ZeRO stages x micro batch sizes x checkpointing policies (one for all
    levels, or that of the settings), without offloading to the host."""
    rows = min(phase.batch_size for phase in config.data.all_phases) // machines.gpus
    sizes = [n for n in range(1, rows + 1) if rows % n == 0][:MOST_MICRO_BATCHES]
    models = [] if "auto" in config.model.checkpointing else [config.model]
    models += [config.model.with_checkpointing(policy) for policy in AUTOMATIC]
    for size in sizes:
        train = config.train.model_copy(update={"micro_batch_size": size})
        for stage in range(4):
            zero = config.deepspeed.zero_optimization.model_copy(
                update={"stage": stage, "offload_optimizer": None, "offload_param": None}
            )
            engine = config.deepspeed.model_copy(update={"zero_optimization": zero})
            for model in models:
                changed = {"train": train, "deepspeed": engine, "model": model}
                try:
                    yield forecast(config.model_copy(update=changed), machines)
                except ConfigError:  # the batch of another phase cannot be divided
                    break


def suggest(config: Config, machines: Cluster) -> tuple[Forecast | None, Forecast | None]:
    """Return the suggested settings and those of the least memory; None where nothing fits, or the
    batch has fewer rows than there are accelerators.

    Of all that fits within 5 % of the fastest time (forecasts are not more exact) the suggestion
    has the lowest ZeRO stage, then the shortest step, then the largest micro batch.
    """
    found = list(candidates(config, machines))
    fitting = [each for each in found if each.fits]
    fastest = min((each.step_s for each in fitting), default=0.0)
    close = [each for each in fitting if each.step_s <= (1 + EXACT) * fastest]
    return (
        min(close, key=_order, default=None),
        min(found, key=lambda each: each.memory, default=None),
    )


def _order(found: Forecast) -> tuple[int, float, int]:
    config = found.plan.config
    return (
        config.deepspeed.stage,
        float(f"{found.step_s:.3g}"),
        -config.train.micro_batch_size,
    )
