"""Two small runs whose losses are written down in ``tests/golden``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from paths import TESTS
from ranks import hourglass
from tiny_run import TINY, losses

GOLDEN = TESTS / "golden"

RUNS: dict[str, list[str]] = {
    "lucidrains": [
        "model.attention_resampling=bucket",
        "model.levels.1.dropout=0.1",
        "train.precision=fp32",
    ],
    "modern": [
        "model.norm=rms",
        "model.feed_forward=swiglu",
        "model.positions=rope",
        "model.max_seq_len=null",
        "model.skip=gated",
        "model.qk_norm=true",
        "model.z_loss=1e-4",
        "model.levels.1.pooling=spacelike",
        "data.isolate_documents=true",
        "optim.name=muon",
        "optim.level_lr=[1.0, 0.5]",
        "train.precision=bf16",
    ],
}


def run(name: str, dataset: Path, folder: Path) -> dict[str, float]:
    config = folder / f"{name}.yaml"
    config.write_text(yaml.safe_dump(yaml.safe_load(TINY)))
    done = hourglass(
        *("train", config, f"data.dataset={dataset}", f"run.dir={folder / name}"),
        *("train.steps=12", "eval.every=12", *RUNS[name]),
    )
    assert done.returncode == 0, done.stderr
    return {str(step): loss for step, loss in losses(folder / name).items()}


def processor() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    facts = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
    wanted = ("vendor_id", "cpu family", "model")
    return {key: facts.get(key) for key in wanted} | {"torch": torch.__version__}
