"""Cost of a run: parameters and FLOPs of its model, memory and traffic of one rank."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch

from hourglass_dist.config.schema import Config
from hourglass_dist.core.text import show_bytes
from hourglass_dist.model.settings import ModelConfig
from hourglass_dist.planning.count import Activations, Pass, count
from hourglass_dist.planning.flops import ModelFlops, model_flops
from hourglass_dist.planning.parameters import Parameters, parameters_of
from hourglass_dist.planning.zero import (
    MASTER_BYTES,
    MOMENT_BYTES,
    RankMemory,
    Traffic,
    rank_memory,
    rank_traffic,
)

AUTOMATIC = ("none", "selective", "full")
"""Checkpointing policies that ``auto`` chooses from."""


@dataclass(frozen=True)
class Plan:
    """Cost of a run's model and of one of its ranks."""

    config: Config
    """Settings of the run; with a ``device``, ``auto`` checkpointing is replaced by its choice."""
    world_size: int
    device: str | None
    """Type of the device for which activations are counted; None: they are not counted."""
    parameters: Parameters
    flops: ModelFlops
    """FLOPs on rows of the longest phase."""
    activations: Activations | None
    """Activation bytes of one micro batch."""
    memory: RankMemory
    traffic: Traffic

    @property
    def micro_batches(self) -> int:
        """Micro batches of one rank in one optimizer step."""
        return self.config.accumulation_steps(self.world_size)

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of one checkpoint over all ranks: fp32 weights and moments, frozen weights."""
        trained = self.parameters.trained
        frozen = self.parameters.total - trained
        return (MASTER_BYTES + MOMENT_BYTES) * trained + MASTER_BYTES * frozen

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step after the last phase, over all ranks."""
        return self.config.data.batch_size * self.config.data.seq_len

    @property
    def tokens(self) -> int:
        """Tokens of the whole run."""
        return self.config.data.tokens(self.config.train.steps)

    @property
    def training_flops(self) -> float:
        """FLOPs of the whole run without recomputation, as if all rows had the longest length."""
        return self.tokens * self.flops.training_per_token

    def flops_per_token(self, length: int) -> tuple[float, float]:
        """Return training FLOPs/token without and with recomputation, in rows of ``length``."""
        flops = _flops(self.config, length)
        return flops.training_per_token, flops.hardware_per_token


def plan(config: Config, world_size: int, device: str | None = None) -> Plan:
    """Return the cost of ``config`` on ``world_size`` ranks.

    With ``device``, ``cuda`` or ``cpu``, activations are counted and ``auto`` checkpointing is
    chosen for its kernels; without it activations are left out. Raises ConfigError when batch or
    weights cannot be divided among the ranks, ValueError when activations exceed
    ``train.activation_memory`` under every policy.
    """
    activations = None
    if device:
        config = settle_checkpointing(config, device)
        activations = count(config.model, _pass(config, device)).under(config.model.checkpointing)
    parameters = parameters_of(config.model)
    return Plan(
        config=config,
        world_size=world_size,
        device=device,
        parameters=parameters,
        flops=_flops(config, config.data.longest),
        activations=activations,
        memory=rank_memory(config, parameters, activations, world_size),
        traffic=rank_traffic(config, parameters.trained, world_size),
    )


def settle_checkpointing(config: Config, device: str) -> Config:
    """Return ``config`` with ``auto`` activation checkpointing replaced by the best choice for this
    type of device.

    Raises ValueError when no choice fits ``train.activation_memory``.
    """
    if "auto" not in config.model.checkpointing:
        return config
    budget = int((config.train.activation_memory or 0) * 2**30)
    model = choose_checkpointing(config.model, _pass(config, device), budget)
    return config.model_copy(update={"model": model})


def choose_checkpointing(model: ModelConfig, how: Pass, budget: int) -> ModelConfig:
    """Return ``model`` with none, selective or full for every ``auto`` level: the choice with the
    least recomputation whose activations fit ``budget`` bytes.

    Raises ValueError with the least possible bytes when no choice fits.
    """
    record = count(model, how)
    choices = [AUTOMATIC if policy == "auto" else (policy,) for policy in model.checkpointing]
    needed = {policies: record.under(policies).total for policies in product(*choices)}
    fitting = [policies for policies, size in needed.items() if size <= budget]
    if not fitting:
        raise ValueError(
            "model.levels.activation_checkpointing: auto: activations of a micro batch of "
            f"{how.rows} x {how.length} tokens take {min(needed.values()):,} bytes or more, "
            f"given {budget:,}"
        )

    def cost(policies: tuple[str, ...]) -> tuple[int, int]:
        """Return the recomputed FLOPs; at equal FLOPs a choice that keeps more bytes is better."""
        flops = model_flops(model.with_checkpointing(policies), how.length, packed=how.packed)
        return flops.recomputed, -needed[policies]

    return model.with_checkpointing(min(fitting, key=cost))


def _flops(config: Config, length: int) -> ModelFlops:
    return model_flops(config.model, length, packed=config.data.isolate_documents)


def _pass(config: Config, device: str) -> Pass:
    """Return the forward pass of one micro batch of the longest rows."""
    narrow = config.train.precision != "fp32"
    return Pass(
        rows=config.train.micro_batch_size,
        length=config.data.longest,
        dtype=torch.bfloat16 if narrow else torch.float32,
        packed=config.data.isolate_documents,
        device=device,
        autocast=narrow and config.deepspeed.stage == 0,
    )


def too_large(config: Config, world_size: int, device: str) -> str:
    """Return the error message for a run out of memory on a rank: the plan and the cheapest
    remedies."""
    made = plan(config, world_size, device)
    memory, micro = made.memory, config.train.micro_batch_size
    ways = []
    if micro > 1:
        ways.append(f"train.micro_batch_size={micro // 2} (the same batch, half the activations)")
    for index, level in enumerate(made.config.model.levels):
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
