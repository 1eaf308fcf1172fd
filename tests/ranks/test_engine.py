"""ZeRO against plain PyTorch; the training state carried across stages and numbers of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_cases import run_cases, whole_state
from ranks import run_worker
from toy import make_config, plain_pytorch

from hourglass_dist.config.loader import ConfigError, parse
from hourglass_dist.config.schema import Config
from hourglass_dist.engine.deepspeed_config import deepspeed_settings
from hourglass_dist.model.hourglass import HourglassLM
from hourglass_dist.planning.parameters import parameters_of


def test_stages_agree_with_plain_pytorch_and_read_one_another(tmp_path: Path) -> None:
    """Two ranks, accumulation 2, clipping on: ZeRO 1, and ZeRO 3 continued at 1. The slow tests try
    every stage, precision and number of ranks."""
    folder = str(tmp_path / "state")
    cases: list[dict[str, Any]] = [{"stage": 1, "steps": 6, "rehearse": True}]
    cases += [{"stage": 3, "steps": 4, "save": folder}]
    cases += [{"stage": 1, "first": 4, "steps": 6, "load": folder}]
    whole, begun, continued = run_cases(tmp_path, 2, cases)
    expected = plain_pytorch(6)
    assert whole["losses"] == pytest.approx(expected, abs=1e-5)
    assert begun["losses"] + continued["losses"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_every_stage_agrees_with_plain_pytorch(tmp_path: Path) -> None:
    """Two ranks, accumulation 2, clipping on, 20 steps: losses within 1e-5 at every step."""
    expected = plain_pytorch(20)
    cases: list[dict[str, Any]] = [{"stage": stage, "steps": 20} for stage in range(4)]
    more = [case | {"dry_run": True} for case in cases]
    more += [case | {"offload": True} for case in cases[1:]]
    found = run_cases(tmp_path, 2, [*cases, *more])
    results, dry_run, offloaded = found[:4], found[4:8], found[8:]
    for result in offloaded:
        assert result["losses"] == pytest.approx(expected, abs=1e-5)
    assert dry_run == results, "a dry-run step changes nothing, bit for bit"
    print("\nstage  largest difference of the loss from plain PyTorch")
    for stage, result in enumerate(results):
        worst = max(abs(a - b) for a, b in zip(result["losses"], expected, strict=True))
        print(f"{stage:5}  {worst:.1e}")
        assert worst < 1e-5
    assert all(norm > 0 for result in results for norm in result["norms"])
    trained = parameters_of(make_config(2).model).trained
    assert results[3]["buffer"] == trained  # not DeepSpeed's 500 M elements


@pytest.mark.slow
def test_state_moves_between_stages_and_world_sizes(tmp_path: Path) -> None:
    """Ten steps, save; any stage on 1, 2 or 4 ranks has the same weights and moments, bit for bit,
    and goes on as the uninterrupted run did. tests.measure.reshape does all of it."""
    whole, *_ = run_cases(tmp_path, 2, [{"stage": 1, "steps": 15}])
    saves = [{"stage": s, "steps": 10, "save": str(tmp_path / f"stage{s}")} for s in range(4)]
    run_cases(tmp_path, 2, saves)
    resumes = [
        {"stage": to, "first": 10, "steps": 15, "load": str(tmp_path / f"stage{frm}")}
        for frm in range(4)
        for to in range(4)
    ]
    for ranks, some in ((1, resumes[1::5]), (2, resumes[::2] + resumes[5:6]), (4, resumes[3::4])):
        some = [c | {"resave": str(tmp_path / f"{ranks}-{i}")} for i, c in enumerate(some)]
        for case, result in zip(some, run_cases(tmp_path, ranks, some), strict=True):
            worst = max(
                abs(a - b) for a, b in zip(result["losses"], whole["losses"][10:], strict=True)
            )
            assert worst < 4e-6, (ranks, case, worst)  # 1e-6 of the loss
            before, after = whole_state(Path(case["load"])), whole_state(Path(case["resave"]))
            assert before.keys() == after.keys()
            assert all(torch.equal(before[name], after[name]) for name in before)
            same = case["load"].endswith(f"stage{case['stage']}")
            if ranks == 2 and same and case["stage"] == 1:
                assert result["losses"] == whole["losses"][10:], (
                    "same stage, same ranks: bit for bit"
                )


@pytest.mark.slow
def test_a_second_copy_in_every_node_changes_nothing(tmp_path: Path) -> None:
    """Groups of two among four ranks, two micro batches: bit for bit the losses of stage 3, resumed
    (after a look that makes the copies, of other weights) or not, and a state for other stages."""
    plain: dict[str, Any] = {"stage": 3, "steps": 10, "micro_batch_size": 2}
    copies = plain | {"hpz": 2}
    folder = str(tmp_path / "state")
    cases = [plain, copies | {"steps": 6, "save": folder}]
    cases += [copies | {"first": 6, "load": folder, "look": True}]
    whole, begun, resumed = run_cases(tmp_path, 4, cases)
    assert begun["losses"] + resumed["losses"] == whole["losses"]
    assert resumed["eval"] == whole["eval"]
    parameters = sum(p.numel() for p in HourglassLM(make_config(3).model).parameters())
    assert whole["second_copy"] == 0
    assert resumed["second_copy"] == pytest.approx(parameters / 2, rel=0.03)  # frozen ones unread
    moved, *_ = run_cases(tmp_path, 2, [{"stage": 1, "first": 6, "steps": 10, "load": folder}])
    assert moved["losses"] == pytest.approx(whole["losses"][6:], abs=4e-6)


@pytest.mark.slow
def test_a_state_loaded_after_an_evaluation_is_what_is_trained(tmp_path: Path) -> None:
    """An evaluation leaves weights gathered, which are those of before the load."""
    folder = str(tmp_path / "state")
    begun = {"stage": 1, "steps": 4, "save": folder}
    back = {"first": 4, "steps": 7, "load": folder, "back": folder, "back_at": 4}
    cases = [{"stage": stage, "micro_batch_size": 2} | back for stage in (1, 3)]
    cases.append(cases[-1] | {"hpz": 2})
    for result in run_cases(tmp_path, 4, [begun, *cases])[1:]:
        assert result["again"] == result["losses"]


@pytest.mark.slow
def test_at_stage_3_the_model_is_never_whole(tmp_path: Path, tiny_config: Path) -> None:
    """Its parts are those of the whole one, and know their group for a second copy."""
    run_worker(4, "meta_worker.py", tmp_path / "out.json", tiny_config)
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["same"]
    assert found["most"] < 0.1 * found["total"]
    assert found["groups"] == [2]


@pytest.mark.slow
def test_bf16_follows_fp32_and_resumes_exactly(tmp_path: Path) -> None:
    """bf16 stays near the fp32 losses, and a resumed run repeats the uninterrupted one bit for
    bit."""
    cases: list[dict[str, Any]] = []
    for stage in range(4):
        common = {"stage": stage, "precision": "bf16", "steps": 20}
        folder = str(tmp_path / f"stage{stage}")
        cases += [common, common | {"steps": 10, "save": folder}]
        cases += [common | {"first": 10, "load": folder}]
    results = run_cases(tmp_path, 2, cases)
    expected = plain_pytorch(20)
    for whole, resumed in zip(results[::3], results[2::3], strict=True):
        assert max(abs(a - b) for a, b in zip(whole["losses"], expected, strict=True)) < 0.05
        assert resumed["losses"] == whole["losses"][10:]


@pytest.mark.slow
def test_fp16_follows_fp32_and_resumes_with_its_loss_scale(tmp_path: Path) -> None:
    """Near the fp32 losses and norms; from too large a scale it comes down, step by step without
    effect, and a run resumed before that is over goes on with the scale it had."""
    cases: list[dict[str, Any]] = []
    for stage in (2, 3):  # 1 has the optimizer of 2
        common = {"stage": stage, "precision": "fp16", "steps": 20}
        overflowing = common | {"scale": 2.0**26}
        folder = str(tmp_path / f"stage{stage}")
        cases += [common | {"dry_run": True}, overflowing]
        cases += [overflowing | {"steps": 3, "save": folder}, common | {"first": 3, "load": folder}]
    results = run_cases(tmp_path, 2, [*cases, {"stage": 1, "steps": 20}])
    exact = results.pop()
    for steady, whole, begun, resumed in zip(*(results[i::4] for i in range(4)), strict=True):
        assert all(steady["applied"])
        assert steady["losses"] == pytest.approx(exact["losses"], abs=0.01)
        assert steady["norms"] == pytest.approx(exact["norms"], rel=0.02)
        skipped = whole["applied"].count(False)
        assert not any(whole["applied"][:4]), "it still comes down where the run is resumed"
        assert any(whole["applied"])
        assert whole["scale"] == 2.0 ** (26 - skipped)
        assert begun["losses"] + resumed["losses"] == whole["losses"]
        assert resumed["scale"] == whole["scale"]


def test_fp16_at_stage_0_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"fp16 needs .*stage 1, 2 or 3"):
        make_config(0, "fp16")


@pytest.mark.parametrize(
    ("zero", "ranks", "message"),
    [
        ({"stage": 3}, 8, "expected a size that divides the 8 ranks, given 3"),
        ({"stage": 2}, 3, "expected stage 3 without offload_param, given stage 2"),
        ({"stage": 3, "offload_param": "cpu"}, 3, "expected stage 3 without offload_param"),
    ],
)
def test_groups_that_cannot_be_are_refused(zero: dict[str, Any], ranks: int, message: str) -> None:
    plain = make_config(0).model_dump()
    plain["deepspeed"]["zero_optimization"] = zero | {"zero_hpz_partition_size": 3}
    with pytest.raises(ConfigError, match=f"zero_hpz_partition_size: {message}"):
        deepspeed_settings(parse(Config, plain, source="test"), ranks, 1)


def test_world_size_that_does_not_divide_the_batch_is_refused() -> None:
    with pytest.raises(ConfigError, match="world sizes that can: 1, 2, 4"):
        make_config(1).accumulation_steps(3)
