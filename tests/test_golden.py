"""The losses of two small runs, as they were: a change of the numbers is never an accident.

    python tests/test_golden.py          writes tests/golden/ anew; the commit says why

On the kind of processor that wrote them they are compared exactly, elsewhere to 1e-4.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import CORPUS, TINY
from ranks import hourglass
from test_resume import losses

GOLDEN = Path(__file__).parent / "golden"
RUNS: dict[str, list[str]] = {
    "seed": [
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


@pytest.mark.parametrize("name", sorted(RUNS))
def test_the_losses_are_those_written_down(name: str, dataset: Path, tmp_path: Path) -> None:
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    found = run(name, dataset, tmp_path)
    if golden["processor"] == processor():
        assert found == golden["losses"]
    assert found == pytest.approx(golden["losses"], abs=0.02 if name == "modern" else 1e-4)


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        cut = ("--held-out", "last:0.1", "--block-tokens", 16384, "--shard-blocks", 4)
        made = hourglass("data", "shard", CORPUS, "--out", data, *cut)
        assert made.returncode == 0, made.stderr
        for name in RUNS:
            golden = {"processor": processor(), "losses": run(name, data, Path(folder))}
            (GOLDEN / f"{name}.json").write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
