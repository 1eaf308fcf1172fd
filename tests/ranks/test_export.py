"""From a run to an export, and what safetensors, TensorBoard and PyPI's module make of both."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pytest
import torch
from hourglass_transformer_pytorch import HourglassTransformerLM
from ranks import commands, hourglass, torchrun
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import losses

from hourglass_dist.config.schema import load
from hourglass_dist.data.data_plan import DataPlan
from hourglass_dist.data.mixture import make_plan, open_dataset
from hourglass_dist.data.stream import Stream
from hourglass_dist.inference.export import export, load_export


def test_tensorboards_reader_finds_the_scalars(run_folder: Path) -> None:
    events = EventAccumulator(str(run_folder))
    events.Reload()
    assert {"train/loss", "train/bits_per_byte", "heldout/bits_per_byte"} <= set(
        events.Tags()["scalars"]
    )
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 21))
    records = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    last = next(r["train/loss"] for r in records if r["step"] == 20 and "train/loss" in r)
    assert events.Scalars("train/loss")[-1].value == pytest.approx(last, rel=1e-6)


def test_safetensors_lists_the_export(exported: Path) -> None:
    model, _, about = load_export(exported)
    with safe_open(exported / "model.safetensors", framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert shapes == {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert about["trained"]["step"] == 20


def test_evaluation_of_the_export_is_that_of_the_run(
    exported: Path, run_folder: Path, dataset: Path
) -> None:
    """ZeRO-2 on two ranks and the exported model on one score the held-out text alike."""
    done = hourglass("evaluate", exported, "--data", dataset)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    [score] = [r["heldout/bits_per_byte"] for r in records if "heldout/bits_per_byte" in r]
    assert f"{score:.4f} bits/byte" in done.stdout
    assert "111,540 bytes" in done.stdout  # nanoGPT's held-out tenth, whole


def test_the_pypi_module_gives_the_same_logits(
    exported: Path, run_folder: Path, tmp_path: Path
) -> None:
    export(run_folder, tmp_path / "lucidrains", "lucidrains")
    about = json.loads((tmp_path / "lucidrains" / "config.json").read_text())
    reference = HourglassTransformerLM(**{k: _tuples(v) for k, v in about["kwargs"].items()})
    reference.load_state_dict(load_file(tmp_path / "lucidrains" / "model.safetensors"))
    model, _, _ = load_export(exported)
    tokens = torch.randint(256, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = (reference.eval()(tokens) - model(tokens)).abs().max().item()
    print(f"\nlargest difference of a logit: {difference:.1e}")
    assert difference < 1e-5


def _tuples(value: object) -> object:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def test_an_older_step_can_be_exported(run_folder: Path, tmp_path: Path) -> None:
    assert export(run_folder, tmp_path / "older", step=15) == 15
    older, _, _ = load_export(tmp_path / "older")
    assert not list((tmp_path).glob(".unfinished*"))
    assert older.config.dim == 32


def test_generation_streams_and_repeats(exported: Path) -> None:
    common = ("generate", exported, "--prompt", "ROMEO:", "--max-new-tokens", 90)
    once, other = commands((*common, "--seed", 4), (*common, "--seed", 5))
    again = hourglass("generate", exported, "--max-new-tokens", 90, "--seed", 4, stdin=b"ROMEO:")
    assert once.returncode == 0, once.stderr
    assert once.stdout == again.stdout
    assert other.stdout != once.stdout


@pytest.mark.slow
def test_any_bytes_are_a_prompt_for_a_byte_model(exported: Path) -> None:
    done = hourglass("generate", exported, "--max-new-tokens", 5, stdin=b"\xc3\x28\xf0")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_run_begins_with_the_weights_of_an_export(
    exported: Path, tiny_config: Path, dataset: Path, tmp_path: Path
) -> None:
    """At stage 1 and 3 the first loss is that of the finished run, not of new weights."""
    first = []
    for stage in (1, 3):
        run = tmp_path / str(stage)
        arguments = [f"data.dataset={dataset}", f"run.dir={run}", f"train.init_from={exported}"]
        arguments += ["train.steps=1", f"deepspeed.zero_optimization.stage={stage}"]
        done = torchrun(2, "-m", "hourglass_dist.train", str(tiny_config), *arguments)
        assert done.returncode == 0, done.stderr[-3000:]
        first.append(losses(run)[1])
    assert first[0] == pytest.approx(first[1], abs=1e-5)
    model, _, _ = load_export(exported)
    stream = Stream([open_dataset(str(dataset))], make_plan_of(tiny_config, dataset))
    with closing(stream.batches()) as batches, torch.no_grad():
        batch = next(batches)
        nats, count = model(batch.tokens_BL, targets_BL=batch.targets_BL)
    assert first[0] == pytest.approx(float(nats / count), abs=1e-5)


def make_plan_of(config: Path, dataset: Path) -> DataPlan:
    settings = load(config, [f"data.dataset={dataset}"])
    return make_plan([open_dataset(str(dataset))], settings.data, settings.run.seed, 1)


def test_weights_of_another_model_are_refused(
    exported: Path, tiny_config: Path, dataset: Path, tmp_path: Path
) -> None:
    done = hourglass(
        *("train", tiny_config, f"data.dataset={dataset}", f"run.dir={tmp_path / 'run'}"),
        *(f"train.init_from={exported}", "model.levels.1.layers=1"),
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: train.init_from: {exported}: hourglass.inner.pre.1.")
    assert "the run's model has shape None, the export (32,)" in done.stderr
