"""How much of a machine a run uses: operations against the peak, and memory."""

from __future__ import annotations

import resource
from functools import lru_cache
from pathlib import Path

import torch

from hourglass_dist.config.schema import Config
from hourglass_dist.core import ranks
from hourglass_dist.health.history import device_name
from hourglass_dist.planning.cost import ModelCost, model_cost
from hourglass_dist.planning.devices import peak_flops
from hourglass_dist.planning.plan import settle_checkpointing


class Throughput:
    """Operations of a run's tokens, and what its ranks could do at most."""

    def __init__(self, config: Config, world: ranks.World) -> None:
        self._ranks = world.size
        # the table has peaks of bf16 only
        known = peak_flops(device_name(world.device)) if config.train.precision == "bf16" else None
        self._peak = known
        model = settle_checkpointing(config)

        @lru_cache
        def cost(length: int) -> ModelCost:
            return model_cost(model, length)

        self._cost = cost

    def metrics(self, tokens: float, bytes_per_token: float, length: int) -> dict[str, float]:
        """Metrics of ``tokens`` per second over all ranks, in rows of ``length`` tokens.

        MFU is the share of the peak that the model's operations take (PaLM, arXiv 2204.02311), HFU
        that of all operations, those of recomputation too.
        """
        cost = self._cost(length)
        rate = tokens / self._ranks
        values = {
            "train/tokens_per_second": tokens,
            "train/bytes_per_second": tokens * bytes_per_token,
            "train/tflops_per_second_per_rank": rate * cost.training_flops_per_token / 1e12,
        }
        if self._peak:
            values["train/mfu"] = rate * cost.training_flops_per_token / self._peak
            values["train/hfu"] = rate * cost.hardware_flops_per_token / self._peak
        return values


def memory(device: torch.device) -> dict[str, float]:
    """Bytes by name: of a GPU what tensors take, what torch has taken for them, and the most that
    tensors took; of a CPU the resident set of this process now and at most."""
    if device.type == "cuda":
        return {
            "allocated_bytes": torch.cuda.memory_allocated(device),
            "reserved_bytes": torch.cuda.memory_reserved(device),
            "peak_bytes": torch.cuda.max_memory_allocated(device),
        }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    statm = Path("/proc/self/statm")
    pages = int(statm.read_text().split()[1]) if statm.exists() else 0
    return {"resident_bytes": pages * resource.getpagesize() or peak, "peak_bytes": peak}
