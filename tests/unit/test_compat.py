"""What is patched or private in DeepSpeed and torch is still there, and still needed.

A failure here means: read the new source, then change the patch or take it away.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed.elastic.agent.server import local_elastic_agent
from torch.distributed.elastic.rendezvous import dynamic_rendezvous
from torch.distributed.launcher import api as launcher_api

from hourglass_dist.core import ranks
from hourglass_dist.engine import loss_scale
from hourglass_dist.engine.compat import deepspeed
from hourglass_dist.launch.agent import Agent


def source(thing: Any) -> str:
    return inspect.getsource(thing)


def test_the_bf16_optimizer_reports_memory_through_a_name_of_its_own_module() -> None:
    from deepspeed.runtime import bf16_optimizer

    assert "see_memory_usage('begin bf16_optimizer', force=True)" in source(bf16_optimizer)
    assert bf16_optimizer.see_memory_usage is not deepspeed.runtime.utils.see_memory_usage


def test_the_shared_memory_collectives_are_switched_by_this_key() -> None:
    from deepspeed.comm.torch import build_shm_op
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    assert ShareMemCommBuilder.NAME == "deepspeed_shm_comm"
    assert "deepspeed.ops.__compatible_ops__.get(builder.NAME, False)" in source(build_shm_op)
    assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False


def test_deepspeeds_muon_is_not_compiled_at_import() -> None:
    from deepspeed.runtime.zero.muon import original_muon

    assert source(original_muon).count("@compiler.compile()") == 3
    assert not hasattr(original_muon.zeropower_via_newtonschulz5, "_torchdynamo_orig_callable")


def test_a_new_batch_size_leaves_the_count_of_micro_batches() -> None:
    engine = deepspeed.runtime.engine.DeepSpeedEngine
    assert "micro_steps" not in source(engine.set_train_batch_size)
    assert "self.micro_steps" in source(engine.is_gradient_accumulation_boundary)


def test_the_loss_scaler_has_the_fields_that_are_saved() -> None:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    scaler = DynamicLossScaler(
        init_scale=8.0,
        scale_window=4,
        min_scale=1.0,
        delayed_shift=1,
        consecutive_hysteresis=False,
        dtype=torch.float16,
    )
    assert all(hasattr(scaler, name) for name in loss_scale.FIELDS)
    assert scaler.raise_error_at_min_scale
    assert scaler.dynamic


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("runtime.zero.stage_1_and_2", "single_partition_of_fp32_groups bit16_groups ipg_buckets"),
        ("runtime.bf16_optimizer", "fp32_groups_flat_partition bf16_groups update_lp_params"),
        ("utils.tensor_fragment", "_hp_mapping lp_fragment_address hp_fragment_address"),
        ("runtime.zero.stage3", "fp32_partitioned_groups_flat fp16_groups persistent_parameters"),
        ("runtime.zero.stage3", "_partition_all_parameters optimizer_swapper"),
        ("runtime.zero.stage3", "_reassign_or_swap_out_partitioned_parameters"),
        ("runtime.zero.partition_parameters", "ds_tensor ds_numel ds_shape partition_numel"),
        ("runtime.zero.partition_parameters", "ds_secondary_tensor"),
        ("utils.groups", "_get_zero_param_intra_parallel_group _create_zero_param_parallel_group"),
        ("runtime.swap_tensor.partitioned_optimizer_swapper", "release_swap_buffers"),
        ("runtime.swap_tensor.optimizer_utils", "swap_params_info"),
    ],
)
def test_deepspeed_keeps_its_tensors_under_these_names(module: str, names: str) -> None:
    text = source(__import__(f"deepspeed.{module}", fromlist=["x"]))
    assert not [name for name in names.split() if name not in text]


def overrides(kind: type, base: type) -> dict[str, tuple[Callable[..., Any], Callable[..., Any]]]:
    """The methods of ``base`` that ``kind`` replaces: (its own, that of the base)."""
    return {
        name: (own, getattr(base, name))
        for name, own in vars(kind).items()
        if inspect.isfunction(own) and name != "__init__" and not name.startswith("__")
        if hasattr(base, name)
    }


def test_the_agent_replaces_methods_that_torch_calls() -> None:
    base = local_elastic_agent.LocalElasticAgent
    replaced = overrides(Agent, base)
    expected = "run _invoke_run _rendezvous _monitor_workers _restart_workers _shutdown"
    assert set(expected.split()) <= set(replaced)
    for name, (own, theirs) in replaced.items():
        mine, torchs = (list(inspect.signature(each).parameters) for each in (own, theirs))
        assert mine == torchs, name
    text = source(base) + "".join(source(other) for other in base.__mro__[1:-1])
    for name in ("_remaining_restarts", "_shutdown_timeout", "_store", "_worker_group"):
        assert f"self.{name}" in text, name


def test_torchrun_makes_the_agent_through_a_name_of_its_own_module() -> None:
    assert "LocalElasticAgent(" in source(launcher_api.launch_agent)


def test_the_rendezvous_has_the_parts_that_are_watched() -> None:
    text = source(dynamic_rendezvous.DynamicRendezvousHandler)
    assert "self._state_holder = state_holder" in text
    assert "self._this_node = node" in text
    assert "self._store = store" in text


def test_the_process_group_has_a_store() -> None:
    ranks.init()
    store = torch.distributed.distributed_c10d._get_default_store()
    store.set("compat", "1")
    assert store.get("compat") == b"1"
    assert store.delete_key("compat")


def test_the_profiler_names_ranges_without_an_operation() -> None:
    from torch._C._profiler import _RecordFunctionFast

    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
        _RecordFunctionFast("a range"),
    ):
        torch.ones(2).sum()
    assert "a range" in {event.name for event in profile.events()}


def test_a_backward_pass_calls_back_at_its_end() -> None:
    seen: list[str] = []
    x = torch.ones(1, requires_grad=True)
    y = x * 2

    def begin(_: torch.Tensor) -> None:
        torch.autograd.Variable._execution_engine.queue_callback(lambda: seen.append("end"))
        seen.append("begin")

    y.register_hook(begin)
    y.backward()
    assert seen == ["begin", "end"]
