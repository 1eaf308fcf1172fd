"""What a run notes at its evaluations; and that looking changes nothing, at ZeRO-1 and ZeRO-3."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from datasets import make, words
from ranks import run_worker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import PERSIST, losses

from hourglass_dist.data.held_out import held_out_rows
from hourglass_dist.data.mixture import open_dataset
from hourglass_dist.inference.export import export, load_export
from hourglass_dist.training.samples import (
    NEW_TOKENS,
    Sample,
    prompts_of_rows,
    prompts_of_text,
    write_samples,
)

pytestmark = pytest.mark.slow  # all need two trainings of two ranks

STEPS = 4
PROMPTS = ["Où? ", "b c"]
SETTINGS = """
run: {dir: unused, seed: 3}
data:
  sources: [{name: web, path: WEB}, {name: books, path: BOOKS}]
  seq_len: 32
  batch_size: 8
model:
  dim: 32
  heads: 2
  dropout: 0.2
  residual_dropout: true
  positions: rope
  levels: [{layers: [1, 1]}, {layers: [1, 1], shorten: 2}, {layers: 1, shorten: 2}]
optim: {lr: 1e-3, warmup_steps: 5}
train: {steps: 4, micro_batch_size: 2}
eval: {every: 1000, batch_size: 8}
checkpoint: {every: 100}
metrics: {every: 1}
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``quiet1`` and ``quiet3`` are evaluated at their end only, ``looked1`` and ``looked3`` after
    every step, with all there is; the last two were stopped after a step and continued."""
    folder = tmp_path_factory.mktemp("evaluations")
    config = folder / "config.yaml"
    text = SETTINGS
    for name, seed in (("WEB", 1), ("BOOKS", 2)):
        (folder / name).mkdir()
        make(folder / name, words(150, seed), held_out="last:0.3")
        text = text.replace(name, str(folder / name / "dataset"))
    config.write_text(text)
    looking = "every: 1, batch_size: 8, samples: 2, stride: 16, context: 64"
    commands = []
    for stage in (1, 3):
        zero = f"deepspeed.zero_optimization={{stage: {stage}, {PERSIST if stage == 3 else ''}}}"
        looked = folder / f"looked{stage}"
        looked.mkdir()
        (looked / "STOP").touch()
        for name in ("positions.jsonl", "samples.jsonl"):
            (looked / name).write_text('{"step": 3, "stride": 2, "prompt": "given up"}\n')
        prompts = f", prompts: {json.dumps(PROMPTS)}" if stage == 1 else ""
        again = [str(config), zero, f"run.dir={looked}", f"eval={{{looking}{prompts}}}"]
        commands += [[str(config), zero, f"run.dir={folder / f'quiet{stage}'}"], again, again]
    run_worker(2, "evaluation_worker.py", json.dumps(commands))
    return folder


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("stage", [1, 3])
def test_looking_changes_nothing(runs: Path, stage: int) -> None:
    """The losses of every step, with dropout, bit for bit."""
    quiet, looked = losses(runs / f"quiet{stage}"), losses(runs / f"looked{stage}")
    assert sorted(quiet) == list(range(1, STEPS + 1))
    assert looked == quiet


def test_every_source_has_its_score_and_the_whole_is_their_sum(runs: Path) -> None:
    for kind, steps in (("heldout", list(range(1, STEPS + 1))), ("sliding", [STEPS])):
        found = [r for r in lines(runs / "looked1" / "metrics.jsonl") if f"{kind}/loss" in r]
        assert [record["step"] for record in found] == steps
        for record in found:
            parts = [f"{kind}/{name}" for name in ("web", "books")]
            size = sum(record[f"{part}/bytes"] for part in parts)
            bits = sum(record[f"{part}/bytes"] * record[f"{part}/bits_per_byte"] for part in parts)
            assert size == record[f"{kind}/bytes"] > 0
            assert bits / size == pytest.approx(record[f"{kind}/bits_per_byte"], rel=1e-12)
    ends = [lines(runs / name / "metrics.jsonl") for name in ("quiet1", "looked1")]
    quiet, looked = ([r for r in end if "heldout/loss" in r][-1] for end in ends)
    assert quiet == looked


def test_places_add_up_to_the_score(runs: Path) -> None:
    folder = runs / "looked3"
    scores = {r["step"]: r["heldout/bits_per_byte"] for r in lines(folder / "metrics.jsonl")
              if "heldout/loss" in r}  # fmt: skip
    found = lines(folder / "positions.jsonl")
    assert [(r["step"], r["stride"]) for r in found] == [
        (step, stride) for step in range(1, STEPS + 1) for stride in (2, 4)
    ]
    for record in found:
        assert len(record["bits_per_byte"]) == len(record["bytes"]) == record["stride"]
        bits = math.fsum(
            bits * size for bits, size in zip(record["bits_per_byte"], record["bytes"], strict=True)
        )
        assert bits / sum(record["bytes"]) == pytest.approx(scores[record["step"]], rel=1e-12)


@pytest.mark.parametrize("stage", [1, 3])
def test_samples_are_those_of_the_model_as_it_is(runs: Path, tmp_path: Path, stage: int) -> None:
    """The weights, put together from all ranks, are those of the export; in their own file, once
    for every evaluation."""
    run = runs / f"looked{stage}"
    found = lines(run / "samples.jsonl")
    assert Counter(r["step"] for r in found) == dict.fromkeys(range(1, STEPS + 1), 2)
    export(run, tmp_path / "export")
    model, tokenizer, _ = load_export(tmp_path / "export")
    if stage == 1:
        prompts = prompts_of_text(PROMPTS, tokenizer)
    else:
        held_out = held_out_rows([open_dataset(str(runs / "WEB" / "dataset"))], 32, 2)
        prompts = prompts_of_rows(held_out, 2)
    again = write_samples(model.config, model.state_dict(), tokenizer, prompts, 2, seed=3)
    last = [Sample(r["prompt"], r["text"]) for r in found if r["step"] == STEPS]
    assert last == again
    assert len({sample.text for sample in last}) == 2
    assert any(len(sample.text) > NEW_TOKENS // 4 for sample in last)
    assert [sample.prompt for sample in last] == PROMPTS or stage == 3


def test_tensorboard_reads_places_and_samples(runs: Path) -> None:
    events = EventAccumulator(str(runs / "looked1"))
    events.Reload()
    tags = events.Tags()
    assert {"heldout/place_of_2", "heldout/place_of_4"} <= set(tags["histograms"])
    assert "samples/1/text_summary" in tags["tensors"]
    [*_, newest] = events.Histograms("heldout/place_of_4")
    [*_, noted] = lines(runs / "looked1" / "positions.jsonl")
    assert newest.step == STEPS
    assert [b for b in newest.histogram_value.bucket if b] == pytest.approx(noted["bits_per_byte"])
