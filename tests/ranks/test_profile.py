"""A profile adds up, knows what is recomputed, and changes no loss."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ranks import torchrun
from tiny_run import losses

from hourglass_dist.report.page import write_report
from hourglass_dist.training.profile_table import time_of_parts


@pytest.mark.slow
def test_two_steps_are_taken_apart(
    tiny_config: Path, dataset: Path, run_folder: Path, tmp_path: Path
) -> None:
    """On two ranks at stage 2, with an evaluation between the steps, which is none of them."""
    run = tmp_path / "run"
    done = torchrun(
        2,
        *("-m", "hourglass_dist.train", str(tiny_config), f"data.dataset={dataset}"),
        *(f"run.dir={run}", "deepspeed.zero_optimization.stage=2", "eval.every=4"),
        *("model.levels.0.activation_checkpointing=full", "metrics.profile_steps=[4,5]"),
        "model.levels.1.activation_checkpointing=selective",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(run) == losses(run_folder)
    [trace] = (run / "profile").glob("*.json")
    events = json.loads(trace.read_text())["traceEvents"]
    steps = [event["dur"] / 1000 for event in events if event.get("name") == "part: step"]
    assert len(steps) == 2
    parts = time_of_parts(events)
    assert sum(parts.values()) == pytest.approx(sum(steps), rel=1e-3)
    passes = {"level 0": 3, "level 1": 3, "embeddings, output": 2}
    expected = {
        f"{name}, {kind}"
        for name, count in passes.items()
        for kind in ("forward", "backward", "recompute")[:count]
    }
    others = {"gradients", "optimizer", "communication", "data", "other"}
    assert set(parts) == expected | others
    assert all(parts[part] > 0 for part in expected)
    assert parts["other"] < 0.3 * sum(parts.values()), "what has no name is the smaller part"
    table = (run / "profile" / "table.txt").read_text()
    assert f"{sum(steps) / 2:.2f}" in table.splitlines()[-1]
    write_report(run, run / "report.html")
    assert "Where the time goes" in (run / "report.html").read_text()


def test_kernels_belong_to_the_range_that_launched_them() -> None:
    """As on a GPU: kernels run later than they are launched, NCCL's beside others."""

    def event(cat: str, name: str, ts: int, dur: int, correlation: int = 0) -> dict[str, object]:
        about = {"cat": cat, "name": name, "ts": ts, "dur": dur}
        return about | {"ph": "X", "args": {"correlation": correlation}}

    events = [
        event("user_annotation", "part: step", 0, 20_000),
        event("user_annotation", "part: level 0, forward", 1_000, 4_000),
        event("user_annotation", "part: level 1, forward", 2_000, 1_000),
        event("user_annotation", "part: gradients", 5_000, 4_000),
        event("cuda_runtime", "cudaLaunchKernel", 1_500, 5, 1),
        event("cuda_runtime", "cudaLaunchKernel", 2_500, 5, 2),
        event("cuda_runtime", "cudaLaunchKernel", 6_000, 5, 3),
        event("kernel", "gemm", 4_000, 3_000, 1),
        event("kernel", "gemm", 7_000, 5_000, 2),
        event("kernel", "ncclDevKernel_AllReduce", 10_000, 4_000, 3),
    ]
    assert time_of_parts(events) == {
        "level 0, forward": 3,
        "level 1, forward": 5,
        "communication": 2,
        "idle": 10,
    }
