"""DeepSpeed's configuration, derived from this project's settings."""

from __future__ import annotations

import os
from typing import Any

import torch

from hourglass_dist.config.schema import Config

REDUCE_BUCKET = 500_000_000
"""Default size of DeepSpeed's reduce bucket, elements."""


def deepspeed_settings(config: Config, world_size: int, trained: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration for a run that trains ``trained`` parameters.

    Raises ConfigError when ``world_size`` ranks cannot share the batch or the weights.
    """
    zero = config.deepspeed.zero_optimization.model_dump(exclude_none=True)
    if config.deepspeed.group_size(world_size) is None:
        zero.pop("zero_hpz_partition_size", None)
    zero["reduce_bucket_size"] = reduce_bucket(config, trained)
    folder = zero.pop("offload_folder", None)
    for name in zero.keys() & {"offload_optimizer", "offload_param"}:
        zero[name] = {"device": zero[name], "pin_memory": torch.cuda.is_available()}
    if config.deepspeed.zero_optimization.offload_optimizer == "nvme":
        # DeepSpeed names files by rank only: two runs would overwrite each other's.
        zero["offload_optimizer"]["nvme_path"] = folder + os.path.abspath(config.run.dir)
    if config.deepspeed.stage == 3:
        # DeepSpeed's own linear adds its bias in place on a tensor that checkpointing may keep.
        zero["memory_efficient_linear"] = False
    settings: dict[str, Any] = {
        "train_batch_size": config.data.batch_size,
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": config.accumulation_steps(world_size),
        # Without clipping DeepSpeed does not check that gradients are finite.
        "gradient_clipping": (config.optim.clip_grad_norm or 1e30) if config.deepspeed.stage else 0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW also runs on the CPU
        "steps_per_print": 2**62,
    }
    if config.train.precision == "bf16" and config.deepspeed.stage > 0:
        settings["bf16"] = {"enabled": True, "check_grad_overflow": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    elif config.train.precision == "fp16":
        settings["fp16"] = {"enabled": True, "hysteresis": 1}  # the scale halves at each overflow
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    elif config.train.precision == "bf16":
        # DeepSpeed's own bf16 takes a hidden optimizer step at stage 0; autocast does not.
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return settings


def reduce_bucket(config: Config, trained: int) -> int:
    """Return the elements reduced at a time: at most ``trained``, because DeepSpeed allocates a
    buffer of this size, by default 1 or 2 GB, even for the smallest model."""
    return min(config.deepspeed.zero_optimization.reduce_bucket_size or REDUCE_BUCKET, trained)
