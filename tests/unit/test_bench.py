"""The benchmarks compare what they say they compare, and their commands run and print."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from lucidrains_pairs import randomise
from paths import ROOT
from ranks import hourglass

from hourglass_dist.bench import model as bench
from hourglass_dist.bench.compare import TOLERANCE, Budget, interval, read_arms
from hourglass_dist.bench.shared import apart, peak_bytes, ratio, reference
from hourglass_dist.model import layers
from hourglass_dist.model.lucidrains import to_lucidrains

CPU = torch.device("cpu")

DECODED = """
run: {dir: unused}
data: {dataset: unused, seq_len: 64, batch_size: 2}
model:
  dim: 32
  heads: 2
  positions: rope
  norm: rms
  levels:
    - {layers: [1, 1], window: 8, activation_checkpointing: full}
    - {layers: 1, shorten: 4, pooling: spacelike, dim: 48}
optim: {lr: 1e-3}
train: {steps: 1, micro_batch_size: 1}
eval: {every: 1, batch_size: 1}
checkpoint: {every: 1}
"""
ARMS = {
    "flat": "learning_rates: [1e-3, 1e-2]\nmodel: {dim: 16, heads: 2, max_seq_len: 64, levels: "
    "[{layers: 1}]}",
    "glass": "learning_rates: [1e-2]\nmodel: {dim: 16, heads: 2, positions: rope, levels: "
    "[{layers: [1, 1]}, {layers: 1, shorten: 4}]}",
}


def pair(shape: str, dtype: torch.dtype) -> tuple[bench.Case, torch.nn.Module, torch.nn.Module]:
    """Small models of both kinds with the same large weights."""
    case = bench.Case(shape, 2, dtype, True, CPU)
    ours, theirs = case.model(), case.reference()
    randomise(ours, seed=3)
    theirs.load_state_dict(to_lucidrains(ours))
    return case, ours, theirs


# --- model ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["readme", "nested", "readme by 8"])
def test_every_change_gives_the_gradients_of_ours_and_of_the_reference(
    shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(bench.AGREES, torch.float64, 1e-6)
    case, ours, theirs = pair(shape, torch.float64)
    changes = [n for n in bench.CHANGES if n != ("keys" if shape != "readme by 8" else "queries")]
    bench.check_agreement(case, ours, theirs, changes)


def test_a_change_that_is_another_function_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    case, ours, theirs = pair("readme", torch.float32)

    def unscaled(q, k, v, sight, scale, dropout=0.0):  # type: ignore[no-untyped-def]
        return bench._attend_spelled_out(q, k, v, sight, 1.01 * scale, dropout)

    wrong = ("wrong", layers, "attend", unscaled)
    monkeypatch.setitem(bench.CHANGES, "attention", wrong)
    with pytest.raises(AssertionError, match="attention: "):
        bench.check_agreement(case, ours, theirs, ["attention"])


@pytest.mark.parametrize("name", ["upsample", "attention", "queries", "selective"])
def test_a_change_takes_place_and_ends(name: str) -> None:
    """Seen by what is kept for the backward pass: other shapes, if not other sizes."""
    case = bench.Case("readme", 2, torch.float32, True, CPU)
    model, batch = case.model(), case.batch(case.length)

    def kept() -> list[tuple[int, ...]]:
        shapes = list[tuple[int, ...]]()

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            shapes.append(tuple(tensor.shape))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(batch[0], targets_BL=batch[1])
        return shapes

    before = kept()
    with bench.changed(name):
        assert kept() != before
    assert kept() == before


def take(mebibytes: int) -> int:
    """How much memory it takes to fill so much, twice in turn."""
    return peak_bytes(lambda: [torch.ones(mebibytes << 18).sum() for _ in range(2)], CPU)


def test_the_peak_of_a_fresh_process_is_what_was_used() -> None:
    """Beside some MiB of libraries that are touched for the first time, whatever the size."""
    small, large = (apart(take, mebibytes, threads=1) for mebibytes in (100, 300))
    assert large - small == pytest.approx(200 << 20, rel=0.05)
    assert 100 << 20 <= small < 116 << 20


def test_an_error_in_another_process_is_raised_here() -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        apart(int, "x", threads=1)


def test_a_ratio_is_that_of_the_rounds() -> None:
    assert ratio([2, 40, 6], [1, 20, 3]) == 2  # whatever slowed the second round


@pytest.mark.slow
def test_the_model_command_prints_and_writes_its_table(tmp_path: Path) -> None:
    file = tmp_path / "new" / "model.json"
    done = hourglass(*("bench", "model", "--quick", "--repeats", 1, "--threads", 1, "--json", file))
    assert done.returncode == 0, done.stderr
    assert "readme: 1 x 64 tokens, float32" in done.stdout
    assert "without fused attention" in done.stdout
    written = json.loads(file.read_text())
    assert written["machine"]["threads"] == 1
    assert [row["variant"] for row in written["rows"]][:2] == ["reference", "ours"]
    assert all(row["peak"] > 0 and len(row["rounds"]) == 1 for row in written["rows"])


@pytest.mark.slow
def test_the_checkpointing_table_has_every_policy_at_every_level(tmp_path: Path) -> None:
    file = tmp_path / "checkpointing.json"
    done = hourglass(
        *("bench", "model", "--checkpointing", "--quick", "--repeats", 1, "--threads", 1),
        *("--json", file),
    )
    assert done.returncode == 0, done.stderr
    kept = {row["policy"]: row["kept"] for row in json.loads(file.read_text())["rows"]}
    assert len(kept) == 1 + 4 * len(bench.POLICIES)
    assert kept["all levels: full"] < kept["level 0: full"] < kept["level 0: selective"]
    assert kept["level 0: selective"] < kept["none"]


# --- decode --------------------------------------------------------------------------------------


def test_the_decode_command_prints_both_models(tmp_path: Path) -> None:
    config = tmp_path / "small.yaml"
    config.write_text(DECODED)
    done = hourglass(
        *("bench", "decode", "--config", config, "--quick", "--repeats", 1, "--threads", 1)
    )
    assert done.returncode == 0, done.stderr
    assert "readme, 4@1 2@2 4@1" in done.stdout
    assert "small.yaml, 1@1 1@4 1@1" in done.stdout
    assert "reference" in done.stdout


# --- compare -------------------------------------------------------------------------------------


@pytest.fixture
def arms(tmp_path: Path) -> Path:
    folder = tmp_path / "arms"
    folder.mkdir()
    for name, text in ARMS.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


def test_the_arms_of_the_project_cost_the_same() -> None:
    entries = read_arms(ROOT / "configs" / "compare", Budget(Path("unused"), 2e12, 8, 256))
    assert len(entries) == 6
    spent = [entry.flops for entry in entries]
    assert max(spent) <= (1 + TOLERANCE) * min(spent)
    assert min(spent) == pytest.approx(2e12, rel=TOLERANCE)


def test_the_interval_is_that_of_student() -> None:
    assert interval([1.0, 2.0, 3.0]) == pytest.approx(4.303 / 3**0.5)


@pytest.mark.slow
def test_a_comparison_trains_what_is_missing_and_only_that(
    arms: Path, dataset: Path, tmp_path: Path
) -> None:
    out = tmp_path / "results" / "compare.jsonl"
    command = (
        *("bench", "compare", arms, "--data", dataset, "--flops", 3e9, "--length", 64),
        *("--seeds", 2, "--out", out),
    )
    planned = hourglass(*command, "--dry-run")
    assert planned.returncode == 0, planned.stderr
    assert "3 runs to choose learning rates, 4 that count" in planned.stdout
    assert not out.exists()

    first = hourglass(*command)
    assert first.returncode == 0, first.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["seed"] for line in lines].count(0) == 3
    assert len(lines) == 7
    assert all(2 < line["bits_per_byte"] < 8 for line in lines)
    rate = min((x for x in lines if x["arm"] == "flat" and x["seed"] == 0), key=bits)["lr"]
    assert {x["lr"] for x in lines if x["arm"] == "flat" and x["seed"] > 0} == {rate}

    kept = [line for line in lines if (line["arm"], line["seed"]) != ("flat", 2)]
    out.write_text("".join(json.dumps(line) + "\n" for line in kept))
    second = hourglass(*command)
    assert second.stdout.count("bits/byte,") == 1
    again = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(map(bits, again)) == sorted(map(bits, lines))


def bits(line: dict[str, float]) -> float:
    return line["bits_per_byte"]


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_mistakes_are_one_line(arms: Path, dataset: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.jsonl"
    damaged.write_text('{"key": "a"}\n{"arm"\n')
    compare = ("bench", "compare", arms, "--data", dataset)
    for arguments, message in [
        (("bench", "model", "--device", "cuda"), "--device: cuda: this PyTorch sees no GPU"),
        (("bench", "model", "--device", "tpu"), "--device: expected auto, cpu or cuda"),
        ((*compare, "--flops", 1e7), "--flops: 1e+07 are too few"),
        (("bench", "compare", tmp_path), "expected a YAML file for each arm, found none"),
        ((*compare, "--out", damaged, "--flops", 3e11), "damaged.jsonl:2: expected a result"),
    ]:
        done = hourglass(*arguments)
        assert done.returncode == 2, (arguments, done.stdout, done.stderr)
        assert done.stderr.startswith("error: ")
        assert message in done.stderr
        assert done.stderr.count("\n") == 1


def test_without_the_reference_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("hourglass_transformer_pytorch")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "hourglass_transformer_pytorch", None)
    with pytest.raises(ValueError, match=r"pip install hourglass_dist\[test\]"):
        reference()
