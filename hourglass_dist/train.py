"""The story of a run, top to bottom.

    torchrun --nproc-per-node 2 -m hourglass_dist.train configs/quickstart.yaml run.dir=runs/mine
    hourglass train configs/quickstart.yaml run.dir=runs/mine         the same program on one rank

Started again in the same run folder, it continues from the newest checkpoint with exactly the
batches and losses that an uninterrupted run would have had.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from hourglass_dist import config as settings
from hourglass_dist import dist
from hourglass_dist.checkpoint import Checkpoints, Progress, RunFolder
from hourglass_dist.config import Config
from hourglass_dist.data.shards import Manifest
from hourglass_dist.data.stream import Batch, Stream, held_out_rows
from hourglass_dist.data.tokenizer import Tokenizer, load_tokenizer, require_same
from hourglass_dist.engine import Engine, StepResult, deepspeed_settings
from hourglass_dist.evaluate import evaluate
from hourglass_dist.metrics import Metrics, due
from hourglass_dist.model.cost import choose_checkpointing
from hourglass_dist.model.hourglass import HourglassLM
from hourglass_dist.sections import print_error


def train(config: Config) -> None:
    """Run, or continue, the training that ``config`` describes.

    Raises ValueError (on every rank, with the same one-line message) for anything the user can
    mend, and FloatingPointError when loss or gradient stop being numbers.
    """
    world = dist.init()
    deepspeed_settings(config, world.size)  # refuses what does not fit, before anything is written
    manifest, tokenizer = dist.together(lambda: open_dataset(config), world.device)
    stream = dist.together(lambda: open_stream(config, manifest, world), world.device)
    run = RunFolder(Path(config.run.dir))
    dist.together(lambda: run.open(config) if world.is_main else None, world.device)
    checkpoints = Checkpoints(run.checkpoints, config.checkpoint.keep, world)

    step = 0
    found = checkpoints.newest()
    if found:
        path, progress = found
        step = progress.step
        check_progress(progress, stream, tokenizer, path)
        if step >= config.train.steps:
            say(world, f"{run.path}: finished: all {config.train.steps} steps are done")
            run.close()
            return
    dist.together(lambda: run.record(config, tokenizer) if world.is_main else None, world.device)
    engine = Engine(make_model(config, world), config, world)
    if found:
        engine.load(path)
    announce(config, world, step)

    lengths = tokenizer.byte_lengths()
    metrics = Metrics(run.path, config, lengths, step, world)
    batches = stream.batches(start_row=step * config.data.batch_size)
    while step < config.train.steps:
        batch = dist.together(lambda: next(batches), world.device)
        result = engine.step(batch.rows, step)
        check_finite(result, step, batch)
        step += 1
        metrics.record(step, result, batch)
        last = step == config.train.steps
        if due(step, config.eval.every) or last:
            with metrics.pause():
                rows = dist.together(lambda: held_out(config, manifest, world), world.device)
                score = evaluate(engine.eval_loss, rows, lengths, world)
            metrics.record_eval(step, score)
        if due(step, config.checkpoint.every) or last:
            data = stream.state(step * config.data.batch_size)
            progress = Progress(step, data, asdict(tokenizer.fingerprint), engine.stage)
            with metrics.pause():
                path = checkpoints.save(engine.save, progress)
            metrics.say(f"step {step}: saved {path}")
    metrics.close()
    run.close()


def open_dataset(config: Config) -> tuple[Manifest, Tokenizer]:
    """The shards and their tokenizer. Raises ValueError when they do not fit each other or the
    model."""
    manifest = Manifest.load(Path(config.data.dataset))
    tokenizer = load_tokenizer(Path(config.data.dataset))
    require_same(
        manifest.tokenizer,
        tokenizer.fingerprint,
        "the shards",
        f"{config.data.dataset}'s tokenizer",
    )
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"model.vocab_size: the tokenizer of {config.data.dataset} has {tokenizer.vocab_size} "
            f"ids, given {config.model.vocab_size}"
        )
    return manifest, tokenizer


def open_stream(config: Config, manifest: Manifest, world: dist.World) -> Stream:
    """The training rows of this rank; its share of the shards, held-out ones too, is verified."""
    held_out(config, manifest, world)
    return Stream(
        manifest,
        "train",
        config.data.seq_len,
        config.data.batch_size,
        config.run.seed,
        world.rank,
        world.size,
        config.data.isolate_documents,
    )


def check_progress(progress: Progress, stream: Stream, tokenizer: Tokenizer, path: Path) -> None:
    """Raises ValueError when a checkpoint belongs to other data or another tokenizer."""
    stream.check(progress.data)
    saved = type(tokenizer.fingerprint)(**progress.tokenizer)
    require_same(saved, tokenizer.fingerprint, str(path), "the dataset's tokenizer")


def make_model(config: Config, world: dist.World) -> HourglassLM:
    """The model on this rank's device, the same weights on every rank."""
    settled = choose_checkpointing(
        config.model,
        config.data.seq_len,
        rows=config.train.micro_batch_size,
        bytes_per_number=2 if config.train.precision == "bf16" else 4,
        budget=int((config.train.activation_memory or 0) * 2**30),
    )
    with torch.device("meta"):
        model = HourglassLM(settled)
    model.to_empty(device=world.device)
    model.init_weights(config.run.seed)
    return model


def held_out(config: Config, manifest: Manifest, world: dist.World) -> Iterator[Batch]:
    """This rank's part of the held-out split, every token once over all ranks."""
    data, rows = config.data, config.eval.batch_size
    return held_out_rows(
        *(manifest, "heldout", data.seq_len, rows, world.rank, world.size, data.isolate_documents)
    )


def check_finite(result: StepResult, step: int, batch: Batch) -> None:
    """Raises FloatingPointError, naming the rows, when the loss or the gradient is no number."""
    if not (math.isfinite(result.nll) and math.isfinite(result.grad_norm)):
        raise FloatingPointError(
            f"step {step + 1}: loss {result.loss}, gradient norm {result.grad_norm}; "
            f"rows of this rank: {batch.row_ids[0]} to {batch.row_ids[-1]}; this step was not saved"
        )


def announce(config: Config, world: dist.World, step: int) -> None:
    """Say what is about to be trained on what."""
    tokens = config.train.steps * config.data.batch_size * config.data.seq_len
    say(
        world,
        f"{config.run.dir}: {config.model.hierarchy}, width {config.model.dim}, "
        f"{world.size} x {world.device.type}, ZeRO stage {config.deepspeed.stage}, "
        f"{config.train.precision}; {config.train.steps:,} steps of {config.data.batch_size} x "
        f"{config.data.seq_len} tokens ({tokens / 1e6:,.1f} M)",
    )
    if step:
        say(world, f"continuing after step {step}")


def say(world: dist.World, line: str) -> None:
    """Print once, not once a rank."""
    if world.is_main:
        print(line, flush=True)


def main(arguments: Sequence[str]) -> int:
    """``CONFIG.yaml key=value ...``; returns the exit code: 0 done, 1 the loss is no number, 2 bad
    settings or data."""
    try:
        if not arguments:
            raise ValueError(
                "expected CONFIG.yaml [key=value ...], for example configs/quickstart.yaml"
            )
        train(settings.load(arguments[0], arguments[1:]))
    except (ValueError, OSError) as error:
        if dist.is_main_process():
            print_error(error)
        return 2
    except FloatingPointError as error:
        if dist.is_main_process():
            print(f"stopped: {error}", file=sys.stderr, flush=True)
        return 1
    finally:
        dist.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
