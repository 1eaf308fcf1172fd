"""Memory and traffic of one rank under DeepSpeed's ZeRO.

Legend: P trained parameters, W ranks. Bytes that DeepSpeed 0.19.8 keeps between the passes of a
step; ``tests.measure.zero`` measures them, and the bytes that a rank sends:

    stage  precision  weights  gradients    master    moments
    0      both       4 P      4 P          -         8 P
    1      fp32       4 P      4 P          4 P / W   8 P / W
    1      bf16       2 P      2 P + 4 P    4 P / W   8 P / W    (the sum of micro batches is fp32)
    2      fp32       4 P      4 P / W      4 P / W   8 P / W
    2      bf16       2 P      4 P / W      4 P / W   8 P / W
    3      fp32       4 P / W  4 P / W      4 P / W   8 P / W
    3      bf16       2 P / W  4 P / W      4 P / W   8 P / W

At most this is added while gradients are reduced (R: the smaller of ``reduce_bucket_size`` and P,
b: bytes of a weight):

    0        both   a flat copy of the gradients, 4 P, of 500 M elements at most
    1        bf16   a copy in fp32 and one in bf16, 6 P, of 500 M elements at most
    1        fp32   R b, and this rank's 4 P / W beside the whole gradients
    2        both   R b (twice with ``overlap_comm``) and a copy of that; in fp32 a second 4 P / W
                    where micro batches are summed
    3        both   the same buffers, and the gathered weights that stay between the passes

A rank sends, with ring algorithms:

    0, 1   one all-reduce of the gradients a step;  1 also one all-gather of the weights
    2      one all-reduce a micro batch, one all-gather of the weights a step
    3      two all-gathers of the weights and one reduce-scatter of the gradients a micro batch;
           the weights that the forward pass used last stay for the backward pass and are gathered
           once: ``stage3_max_live_parameters`` elements, and at least 500 M (half of DeepSpeed's
           default of ``stage3_max_reuse_distance``)

With ``zero_hpz_partition_size`` G each weight is gathered from all ranks once a step, and after
that from a second copy among G ranks, which takes another b P / G until the end of the step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hourglass_dist.config.schema import Config
from hourglass_dist.engine.deepspeed_config import reduce_bucket
from hourglass_dist.planning.count import Activations
from hourglass_dist.planning.parameters import Parameters

MASTER_BYTES, MOMENT_BYTES, SUM_BYTES = 4, 8, 4
"""Bytes per parameter: fp32 weight, AdamW's two fp32 moments, fp32 sum of gradients."""
MAX_LIVE_PARAMETERS, REUSE_DISTANCE = 1_000_000_000, 1_000_000_000
"""DeepSpeed's defaults of ``stage3_max_live_parameters`` and ``stage3_max_reuse_distance``."""
SUB_GROUP, SWAP_BUFFERS = 1_000_000_000, 4
"""DeepSpeed's defaults: elements updated at a time, and the number of buffers of that size
(weights, gradients, two moments) when the optimizer state is in files."""
FLAT_COPY = 500_000_000
"""Elements that stage 0, and stage 1 in bf16, reduce at a time: a constant in DeepSpeed."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank in a training step."""

    weights: int
    gradients: int
    master: int
    """Bytes of the optimizer's fp32 copies of the weights."""
    moments: int
    gathered: int
    """Peak bytes of weights gathered from other ranks, and of hpZ's second copy."""
    buffer: int
    """Peak bytes of gradient buckets and their copies, and of the buffers of an optimizer whose
    state is in files."""
    activations: int
    """Bytes of one micro batch."""
    host: int = 0
    """Bytes of the fields above that are in the host's memory, by offloading."""
    files: int = 0
    """Bytes of the fields above that are in files between steps, and in no memory."""

    @property
    def total(self) -> int:
        """Bytes on the device."""
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


def rank_memory(
    config: Config, parameters: Parameters, activations: Activations | None, world_size: int
) -> RankMemory:
    """Return the memory of one of ``world_size`` ranks; None leaves activations out."""
    zero = config.deepspeed.zero_optimization
    memory = _memory_anywhere(config, parameters, world_size)
    host = memory.weights if zero.offload_param else 0
    if activations:
        held = activations.total + activations.offloaded
        memory = replace(memory, activations=held)
        host += activations.offloaded
    if not zero.offload_optimizer:
        return replace(memory, host=host)
    host += memory.gradients if zero.stage >= 2 else 0  # kept there until the step, too
    kept = memory.master + memory.moments
    if zero.offload_optimizer == "cpu":
        return replace(memory, host=host + kept)
    share = -(-parameters.trained // world_size)
    stepped = SWAP_BUFFERS * SUM_BYTES * min(zero.sub_group_size or SUB_GROUP, share)
    return replace(memory, host=host + stepped, buffer=memory.buffer + stepped, files=kept)


def _memory_anywhere(config: Config, parameters: Parameters, world_size: int) -> RankMemory:
    """Return the memory without activations and without regard to offloading."""
    stage, weight_bytes = config.deepspeed.stage, _weight_bytes(config)
    everything, trained = parameters.total, parameters.trained
    share = -(-trained // world_size)
    summed_apart = stage == 1 and weight_bytes < SUM_BYTES
    group = config.deepspeed.group_size(world_size)
    second_copy = -(-everything // group) if group else 0
    return RankMemory(
        weights=weight_bytes * (-(-everything // world_size) if stage == 3 else everything),
        gradients=SUM_BYTES * (share if stage >= 2 else trained)
        + (weight_bytes * trained if summed_apart else 0),
        master=MASTER_BYTES * share if stage > 0 else 0,
        moments=_moments(config, parameters) // (world_size if stage > 0 else 1),
        gathered=weight_bytes * (staying(config, everything) + second_copy),
        buffer=_reduction_bytes(config, trained, share, config.accumulation_steps(world_size)),
        activations=0,
    )


def _moments(config: Config, parameters: Parameters) -> int:
    """Return the bytes of all moments; Muon keeps one moment of a parameter, not two."""
    muons = parameters.of_muon(config.optim)
    return MOMENT_BYTES * parameters.trained - MOMENT_BYTES // 2 * muons


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


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in one optimizer step."""

    total: int
    after: int
    """Bytes sent after the update, to gather the new weights on all ranks."""
    inside: int
    """Bytes sent inside a group of ``zero_hpz_partition_size`` ranks."""


def rank_traffic(config: Config, trained: int, world_size: int) -> Traffic:
    """Return the bytes that one of ``world_size`` ranks sends for ``trained`` parameters."""
    micro_batches, weight_bytes = config.accumulation_steps(world_size), _weight_bytes(config)
    stage, group = config.deepspeed.stage, config.deepspeed.group_size(world_size)
    again = inside = 0  # gathered in hpZ groups: all but the first all-gather of each weight
    if group is not None:
        again = (2 * trained - staying(config, trained)) * micro_batches - trained
        inside = weight_bytes * again * (group - 1) // group
    # in units of (W - 1) / W elements: an all-reduce is 2, all-gather and reduce-scatter are 1
    elements = {
        0: 2 * trained,
        1: (2 + 1) * trained,
        2: (2 * micro_batches + 1) * trained,
        3: (3 * trained - staying(config, trained)) * micro_batches - again,
    }[stage]
    after = weight_bytes * trained if stage in (1, 2) else 0
    return Traffic(
        total=weight_bytes * elements * (world_size - 1) // world_size + inside,
        after=after * (world_size - 1) // world_size,
        inside=inside,
    )


def staying(config: Config, parameters: int) -> int:
    """Return the elements that stay gathered between the passes at stage 3; 0 at other stages."""
    if config.deepspeed.stage < 3:
        return 0
    live = config.deepspeed.zero_optimization.stage3_max_live_parameters or MAX_LIVE_PARAMETERS
    return min(parameters, max(live, REUSE_DISTANCE // 2))


def _weight_bytes(config: Config) -> int:
    """Return the bytes of a weight in the forward pass; stage 0 in bf16 keeps fp32 (autocast)."""
    return 2 if config.train.precision != "fp32" and config.deepspeed.stage > 0 else 4
