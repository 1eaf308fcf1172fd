"""Use of a machine by a run: FLOP/s compared with the peak, and memory."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import torch


class Throughput:
    """Throughput of a run in tokens, bytes and FLOPs per second."""

    def __init__(
        self,
        ranks: int,
        flops_per_token: Callable[[int], tuple[float, float]],
        peak: float | None,
    ) -> None:
        """Set up; ``flops_per_token(length)`` returns the FLOPs of a token in training, without and
        with recomputation, in rows of that length; ``peak`` is the peak FLOP/s of a rank."""
        self._ranks, self._flops_per_token, self._peak = ranks, flops_per_token, peak

    def metrics(self, tokens: float, bytes_per_token: float, length: int) -> dict[str, float]:
        """Return the metrics of ``tokens`` per second over all ranks, in rows of ``length`` tokens.

        MFU is the model's FLOP/s without recomputation over the peak (PaLM, arXiv 2204.02311), HFU
        the same with recomputation.
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
    """Return bytes by name: of a GPU those of tensors, those reserved by torch and the peak of
    tensors; of a CPU the resident set of this process and its peak."""
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
