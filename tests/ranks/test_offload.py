"""The optimizer's state in files: what is trained and saved is what it is in memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import run_cases, whole_state
from toy import make_config

from hourglass_dist.config.loader import ConfigError
from hourglass_dist.engine import offload
from hourglass_dist.engine.deepspeed_config import deepspeed_settings


class Builder:
    """Stands for DeepSpeed's of async_io."""

    def __init__(self, compatible: bool, error: Exception | None = None) -> None:
        self.compatible, self.error = compatible, error

    def is_compatible(self) -> bool:
        return self.compatible

    def load(self, verbose: bool) -> None:
        if self.error:
            raise self.error


def test_what_cannot_be_had_is_one_line(tmp_path: Path) -> None:
    offload.require_files(Builder(True), tmp_path / "a/b")
    with pytest.raises(ConfigError, match=r"nvme: needs libaio and a C\+\+ compiler .*libaio-dev"):
        offload.require_files(Builder(False), tmp_path)
    with pytest.raises(ConfigError, match=r"nvme: DeepSpeed's async_io cannot be compiled: one$"):
        offload.require_files(Builder(True, RuntimeError("one\ntwo")), tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"offload_folder: .*file/b: Not a directory"):
        offload.require_files(Builder(True), tmp_path / "file/b")


def test_two_runs_do_not_share_files() -> None:
    config = make_config(3, zero_more={"offload_optimizer": "nvme", "offload_folder": "/ssd"})
    zero = deepspeed_settings(config, 1, 1000)["zero_optimization"]
    assert zero["offload_optimizer"]["device"] == "nvme"
    assert zero["offload_optimizer"]["nvme_path"] == "/ssd" + os.path.abspath("unused")
    assert "offload_folder" not in zero


@pytest.mark.cluster
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_state_in_files_trains_and_moves(ranks: int, precision: str, tmp_path: Path) -> None:
    """Several sub-groups in files, small ones in memory: bit for bit the losses and the state of
    the memory of the host, after a dry run or not, resumed or not, whatever the other side has."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        pytest.skip("async_io needs libaio (apt-get install libaio-dev) and a C++ compiler")

    def zero(kind: str, folder: str = "files") -> dict[str, object]:
        files = {"offload_folder": str(tmp_path / folder)} if kind == "nvme" else {}
        both = {"offload_param": "cpu"} if precision == "bf16" else {}
        return {"offload_optimizer": kind, "sub_group_size": 262_144, **files, **both}

    common: dict[str, Any] = {"stage": 3, "dim": 256, "precision": precision, "steps": 10}
    memory, files = (common | {"zero_more": zero(kind)} for kind in ("cpu", "nvme"))
    kept = [str(tmp_path / name) for name in ("memory", "files", "moved", "resaved", "untrained")]
    cases = [
        *(common, memory | {"save": kept[0]}, files | {"dry_run": True}, files),
        files | {"steps": 6, "save": kept[1]},
        *(made | {"first": 6, "load": kept[1]} for made in (files, memory, common)),
        common | {"first": 6, "load": kept[1], "stage": 1},
        files | {"first": 10, "load": kept[0], "resave": kept[2]},
        files | {"first": 6, "load": kept[1], "resave": kept[3], "dry_run": True},
        files | {"zero_more": zero("nvme", "new"), "resave": kept[4]},
    ]
    results = run_cases(tmp_path, ranks, cases)
    plain, in_memory, dry_run, in_files, begun, *resumed = results[:9]
    swaps = list((tmp_path / "files").rglob("rank0/*.tensor.swp"))
    assert len([path for path in swaps if path.name.startswith("exp_avg-")]) >= 2
    assert in_files == in_memory == dry_run == results[-1]
    near = 1e-5 if precision == "fp32" else 0.02
    assert in_files["losses"] == pytest.approx(plain["losses"], abs=near)
    for result in resumed[:2]:
        assert begun["losses"] + result["losses"] == in_files["losses"]
    for result in resumed[2:]:
        assert result["losses"] == pytest.approx(in_files["losses"][6:], abs=near)
    for before, after in ((kept[0], kept[2]), (kept[1], kept[3])):
        one, other = whole_state(Path(before)), whole_state(Path(after))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    fresh = whole_state(Path(kept[4]))
    assert fresh["steps"] == 0
    assert not any(fresh[name].any() for name in fresh if name.startswith("exp_avg"))
