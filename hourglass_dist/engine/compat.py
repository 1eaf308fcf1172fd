"""DeepSpeed, patched: everything that this project changes in it, each with the reason.

DeepSpeed is pinned to one version. ``test_compat.py`` fails when another one changes what a patch
relies on. Its tensors are looked up in ``zero_layout.py`` and ``offload.py``.
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
    """Let optimizer steps of DeepSpeed's ``engine`` cover ``batch_rows`` rows over all ranks."""
    engine.set_train_batch_size(batch_rows)
    engine.micro_steps = 0  # it would go on counting, and steps would end after the wrong pass


def secondary_group(size: int | None) -> Any:
    """The group of ``size`` ranks that keep a second copy of the weights (hpZ) among them, made
    when it is not there; None where nobody keeps one."""
    groups = deepspeed.utils.groups
    if size and groups._get_zero_param_intra_parallel_group() is None:
        deepspeed.init_distributed(verbose=False)  # takes PyTorch's process group, which is there
        groups._create_zero_param_parallel_group(size)
    return groups._get_zero_param_intra_parallel_group()
