"""How much of a machine a run uses: operations against the peak, and memory."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import torch


class Throughput:
    """Operations of a run's tokens, and what its ranks could do at most."""

    def __init__(
        self,
        ranks: int,
        flops_per_token: Callable[[int], tuple[float, float]],
        peak: float | None,
    ) -> None:
        """``flops_per_token(length)`` is what a token costs in rows of that length, forward and
        backward, without and with recomputation; ``peak`` is what a rank could do in a second."""
        self._ranks, self._flops_per_token, self._peak = ranks, flops_per_token, peak

    def metrics(self, tokens: float, bytes_per_token: float, length: int) -> dict[str, float]:
        """Metrics of ``tokens`` per second over all ranks, in rows of ``length`` tokens.

        MFU is the share of the peak that the model's operations take (PaLM, arXiv 2204.02311), HFU
        that of all operations, those of recomputation too.
        """
        training, hardware = self._flops_per_token(length)
        rate = tokens / self._ranks
        values = {
            "train/tokens_per_second": tokens,
            "train/bytes_per_second": tokens * bytes_per_token,
            "train/tflops_per_second_per_rank": rate * training / 1e12,
        }
        if self._peak:
            values["train/mfu"] = rate * training / self._peak
            values["train/hfu"] = rate * hardware / self._peak
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
