"""Patches of DeepSpeed: everything that this project changes in it, each with the reason.

DeepSpeed is pinned to one version. ``test_compat.py`` fails when another version changes what a
patch relies on. ``zero_layout.py`` and ``offload.py`` read DeepSpeed's tensors.
"""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

import torch

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed

__all__ = ["change_accumulation", "deepspeed", "secondary_group"]

deepspeed.utils.logger.setLevel(logging.WARNING)
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
# Its bf16 optimizer prints 18 lines about memory at every start.
deepspeed.runtime.bf16_optimizer.see_memory_usage = lambda *_, **__: None
# Its shared-memory collectives compile for about a minute at start and serve inference only.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
# Its own Muon is imported at every start and never used here; compiling it took a second.
deepspeed.runtime.compiler.compile = lambda: lambda function: function


def change_accumulation(engine: Any, batch_rows: int) -> None:
    """Set the rows of one optimizer step of DeepSpeed's ``engine``, summed over all ranks."""
    engine.set_train_batch_size(batch_rows)
    engine.micro_steps = 0  # its count would continue, and steps would end after the wrong pass


def secondary_group(size: int | None) -> Any:
    """Return the group of ``size`` ranks that share a second copy of the weights (hpZ), created if
    missing; None without hpZ."""
    groups = deepspeed.utils.groups
    if size and groups._get_zero_param_intra_parallel_group() is None:
        deepspeed.init_distributed(verbose=False)  # uses PyTorch's existing process group
        groups._create_zero_param_parallel_group(size)
    return groups._get_zero_param_intra_parallel_group()
