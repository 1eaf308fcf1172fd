"""A plan says what its formulas say, for every stage, and prints it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from paths import CONFIGS

from hourglass_dist.config.loader import ConfigError
from hourglass_dist.config.schema import Config, load
from hourglass_dist.core.text import show_bytes, show_count, show_duration
from hourglass_dist.planning.forecast import cluster, forecast
from hourglass_dist.planning.plan import plan
from hourglass_dist.planning.render import render_plan

LARGE = CONFIGS / "large_zero3.yaml"
HPZ = "deepspeed.zero_optimization.zero_hpz_partition_size"


def quickstart(stage: int, precision: str = "fp32", *more: str) -> Config:
    return load(
        CONFIGS / "quickstart.yaml",
        [
            f"deepspeed.zero_optimization.stage={stage}",
            "deepspeed.zero_optimization.reduce_bucket_size=1000",
            f"train.precision={precision}",
            "data.batch_size=32",
            "train.micro_batch_size=4",
            *more,
        ],
    )


# Bytes of a trained parameter on one of two ranks, as ``tests.measure.zero`` measures them:
# weights, gradients, master, moments.
MEASURED = {
    (0, "fp32"): (4, 4, 0, 8),
    (0, "bf16"): (4, 4, 0, 8),
    (1, "fp32"): (4, 4, 2, 4),
    (1, "bf16"): (2, 6, 2, 4),
    (2, "fp32"): (4, 2, 2, 4),
    (2, "bf16"): (2, 2, 2, 4),
    (3, "fp32"): (2, 2, 2, 4),
    (3, "bf16"): (1, 2, 2, 4),
}


@pytest.mark.parametrize(("stage", "precision"), MEASURED)
def test_memory_on_two_ranks_is_what_was_measured(stage: int, precision: str) -> None:
    made = plan(quickstart(stage, precision), 2)
    trained = made.parameters.trained
    memory = made.memory
    parts = (memory.gradients, memory.master, memory.moments)
    assert tuple(part / trained for part in parts) == pytest.approx(MEASURED[stage, precision][1:])
    assert memory.weights / made.parameters.total == pytest.approx(MEASURED[stage, precision][0])
    width = 2 if precision == "bf16" else 4
    bucket = 1000 * width
    copies = {
        (0, "fp32"): 4 * trained,
        (0, "bf16"): 4 * trained,
        (1, "fp32"): bucket + 4 * trained / 2,
        (1, "bf16"): 6 * trained,
        (2, "fp32"): 2 * bucket + 4 * trained / 2,
    }
    assert memory.buffer == copies.get((stage, precision), 2 * bucket)
    assert memory.gathered == (width * made.parameters.total if stage == 3 else 0)
    rest = memory.gathered + memory.buffer + memory.activations
    assert memory.total == memory.weights + sum(parts) + rest


@pytest.mark.parametrize(
    ("stage", "precision", "sent"),
    # Four micro batches; half of what a collective holds goes out once, twice for an all-reduce.
    [
        (0, "fp32", 4.0), (0, "bf16", 4.0), (1, "fp32", 6.0), (1, "bf16", 3.0),
        (2, "fp32", 18.0), (2, "bf16", 9.0), (3, "fp32", 16.0), (3, "bf16", 8.0),
    ],
)  # fmt: skip
def test_traffic_on_two_ranks(stage: int, precision: str, sent: float) -> None:
    made = plan(quickstart(stage, precision), 2)
    assert made.micro_batches == 4
    assert made.traffic.total / made.parameters.trained == pytest.approx(sent)


def test_weights_that_do_not_stay_are_gathered_twice() -> None:
    one_pass = load(LARGE, ["data.batch_size=64", f"{HPZ}=null"])
    made = plan(one_pass, 64)
    trained, stays = made.parameters.trained, 10**9  # stage3_max_live_parameters
    assert made.memory.gathered == 2 * stays
    assert made.traffic.total == 2 * (3 * trained - stays) * 63 // 64
    few = "deepspeed.zero_optimization.stage3_max_live_parameters=1000"
    made = plan(load(LARGE, ["data.batch_size=64", f"{HPZ}=null", few]), 64)
    assert made.memory.gathered == 2 * 500_000_000  # nearer than DeepSpeed's reuse distance


def test_a_second_copy_takes_memory_and_stays_inside_a_node() -> None:
    groups, alone = (load(LARGE, [f"{HPZ}={size}"]) for size in ("8", "null"))
    one, other = plan(groups, 64), plan(alone, 64)
    assert one.memory.gathered - other.memory.gathered == 2 * -(-one.parameters.total // 8)
    beyond = one.traffic.total - one.traffic.inside
    trained = one.parameters.trained
    assert beyond == 2 * (1 + one.micro_batches) * trained * 63 // 64
    assert plan(groups, 8).traffic == plan(alone, 8).traffic, "all ranks are in one group"
    slow = cluster("h100", 8, 8)
    assert forecast(groups, slow).collectives_s < 0.9 * forecast(alone, slow).collectives_s


def test_state_in_files_is_in_no_memory() -> None:
    zero = "deepspeed.zero_optimization"
    more = [f"{zero}.offload_optimizer=nvme", f"{zero}.offload_folder=/ssd"]
    alone, files = plan(quickstart(3), 2), plan(quickstart(3, "fp32", *more), 2)
    stepped = 16 * -(-alone.parameters.trained // 2)  # all of a rank at a time
    assert files.memory.files == alone.memory.master + alone.memory.moments
    assert files.memory.host == alone.memory.gradients + stepped
    gone = alone.memory.gradients + files.memory.files
    assert files.memory.total == alone.memory.total - gone
    fewer = plan(quickstart(3, "fp32", *more, f"{zero}.sub_group_size=1000"), 2)
    assert fewer.memory.host == alone.memory.gradients + 16 * 1000
    assert " in files " in render_plan(files)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_rank_sends_nothing(stage: int) -> None:
    assert plan(quickstart(stage), 1).traffic.total == 0


def test_activations_and_operations_are_those_of_a_micro_batch() -> None:
    config = quickstart(1, "bf16")
    made, without = plan(config, 2, "cpu"), plan(config, 2)
    assert made.activations is not None
    assert made.memory.total - without.memory.total == made.activations.total > 0
    train = config.train.model_copy(update={"micro_batch_size": 8})
    twice = plan(config.model_copy(update={"train": train}), 2, "cpu")
    assert twice.memory.activations == pytest.approx(2 * made.memory.activations, rel=0.1)
    assert made.tokens == config.train.steps * 32 * config.data.seq_len
    assert made.training_flops == made.tokens * 3 * made.flops.forward_per_token


def test_a_plan_without_a_count_says_so() -> None:
    text = render_plan(plan(quickstart(1), 2))
    assert " in all, without activations " in text
    assert " activations " not in text.replace("without activations", "")


def test_offloaded_activations_are_in_the_hosts_memory() -> None:
    policies = [f"model.levels.{n}.activation_checkpointing=offload" for n in range(2)]
    plain, moved = (plan(quickstart(1, "fp32", *more), 2, "cuda") for more in ([], policies))
    assert plain.memory.host == 0 < moved.memory.host
    assert moved.memory.total < plain.memory.total


def test_a_world_that_does_not_divide_the_batch_is_refused() -> None:
    with pytest.raises(ConfigError, match="world sizes that can: 1, 2, 4, 8"):
        plan(quickstart(1), 3)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_has_a_plan_with_all_levels(path: Path) -> None:
    config = load(path)
    text = render_plan(plan(config, 1, "cpu"))
    assert config.model.hierarchy in text
    for level in range(len(config.model.levels)):
        assert f" level {level} " in text
    for row in ("weights", "gradients", "optimizer: moments", "activations", "in all"):
        assert f" {row} " in text
    assert max(map(len, text.splitlines())) <= 100


def test_sizes_are_shown_in_their_unit() -> None:
    assert [show_bytes(n) for n in (0, 1023, 1024, 3 * 2**29, 2**52)] == [
        "0 B", "1023 B", "1.00 KiB", "1.50 GiB", "4096.00 TiB",
    ]  # fmt: skip
    counts = (7.0, 999, 1000, 1.05e12, 1.25e22, 3e25)
    assert [show_count(n) for n in counts] == ["7", "999", "1 k", "1.05 T", "12.5 Z", "3e+04 Z"]
    seconds = (0, 59.6, 3599, 3600, 47 * 3600 + 61, 2.5 * 86400)
    assert [show_duration(n) for n in seconds] == [
        "0:00", "1:00", "59:59", "1:00:00", "47:01:01", "2.5 days",
    ]  # fmt: skip


def test_a_plan_needs_neither_deepspeed_nor_a_model_in_memory() -> None:
    code = (
        "import sys; from hourglass_dist.config.schema import load;"
        "from hourglass_dist.planning.plan import plan;"
        f"plan(load({str(LARGE)!r}), 64);"
        "assert 'deepspeed' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
