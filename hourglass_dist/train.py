"""The story of a run, top to bottom.

    torchrun --nproc-per-node 2 -m hourglass_dist.train configs/quickstart.yaml run.dir=runs/mine
    hourglass train configs/quickstart.yaml run.dir=runs/mine         the same program on one rank

Started again in the same run folder, it continues from the newest checkpoint with exactly the
batches and losses that an uninterrupted run would have had.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from hourglass_dist import config as settings
from hourglass_dist import dist
from hourglass_dist.checkpoint import Checkpoints, Progress, RunFolder
from hourglass_dist.config import Config
from hourglass_dist.data.mixture import Dataset, make_plan, open_mixture
from hourglass_dist.data.stream import Batch, Stream, held_out_rows
from hourglass_dist.data.tokenizer import Tokenizer, require_same
from hourglass_dist.engine import Engine, deepspeed_settings
from hourglass_dist.evaluate import evaluate
from hourglass_dist.guards import SkippedSteps
from hourglass_dist.history import History
from hourglass_dist.metrics import Metrics, due
from hourglass_dist.model.cost import choose_checkpointing
from hourglass_dist.model.hourglass import HourglassLM
from hourglass_dist.profiling import Profiler
from hourglass_dist.sections import print_error
from hourglass_dist.stop import EXIT_CODE, Interrupted, StopRequests
from hourglass_dist.writers import require_writers


def train(config: Config) -> None:
    """Run, or continue, the training that ``config`` describes, and note when and how it ended.

    Raises ValueError (on every rank, with the same one-line message) for anything the user can
    mend, FloatingPointError when loss or gradient stay no numbers, and Interrupted when the run was
    asked to stop: then it is saved.
    """
    with History(Path(config.run.dir)) as history:
        train_and_note(config, history)


def train_and_note(config: Config, history: History) -> None:
    """As ``train``; ``history`` learns when steps begin and how many are done."""
    world = dist.init()
    deepspeed_settings(config, world.size)  # refuses what does not fit, before anything is written
    require_writers(config.metrics.writers)
    datasets, tokenizer = dist.together(lambda: open_data(config), world.device)
    stream = dist.together(lambda: open_stream(config, datasets, world), world.device)
    dist.require_agreement(stream.identity(), world.device)
    run = RunFolder(Path(config.run.dir))
    dist.together(lambda: run.open(config) if world.is_main else None, world.device)
    requests = StopRequests(run.path, config.run.time_limit_hours, world)
    checkpoints = Checkpoints(run.checkpoints, config.checkpoint.keep, world)

    newest, step = find_state(checkpoints, stream, tokenizer, world)
    if step >= config.train.steps:
        say(world, f"{run.path}: finished: all {config.train.steps} steps are done")
        run.close()
        return
    dist.together(lambda: run.record(config, tokenizer) if world.is_main else None, world.device)
    engine = Engine(make_model(config, world), config, world)
    if newest:
        engine.load(newest)
    announce(config, world, step)

    history.start(step, world)
    lengths = tokenizer.byte_lengths()
    metrics = Metrics(history, config, lengths, engine, world)
    skipped = SkippedSteps(run.path, config.train.max_skipped_steps, step, world)
    profiler = Profiler(run.path, config.metrics.profiled, engine, world)
    batches = profiler.data(stream.batches(start_step=step), step)
    while step < config.train.steps:
        batch = dist.together(lambda: next(batches), world.device)
        with metrics.watch(step + 1), profiler.step(step + 1):
            result = engine.step(batch.rows, step)
        step += 1
        skipped.look(step, result, stream.rows_of(step - 1))
        metrics.record(step, result, batch, stream.epochs_read, skipped.total)
        last = step == config.train.steps
        stop = None if last else requests.reason()
        if due(step, config.eval.every) or last:
            with metrics.pause("evaluation"):
                rows = dist.together(lambda: held_out(config, datasets, world), world.device)
                score = evaluate(engine.eval_loss, rows, lengths, world)
            metrics.record_eval(step, score)
        if due(step, config.checkpoint.every) or last or stop:
            dist.require_agreement(stream.identity(), world.device)
            progress = Progress(
                step, stream.state(step), asdict(tokenizer.fingerprint), engine.stage
            )
            with metrics.pause("checkpoint"):
                path = checkpoints.save(engine.save, progress)
            metrics.say(f"step {step}: saved {path}")
        if stop:
            metrics.close()
            raise requests.honoured(stop, step)
    metrics.close()
    run.close()


def open_data(config: Config) -> tuple[list[Dataset], Tokenizer]:
    """The datasets and their tokenizer. Raises ValueError when they do not fit each other or the
    model."""
    datasets, tokenizer = open_mixture(config.data)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"model.vocab_size: the tokenizer of {datasets[0].where} has {tokenizer.vocab_size} "
            f"ids, given {config.model.vocab_size}"
        )
    return datasets, tokenizer


def open_stream(config: Config, datasets: Sequence[Dataset], world: dist.World) -> Stream:
    """The training rows of this rank; its share of the shards, held-out ones too, is verified."""
    plan = make_plan(datasets, config.data, config.run.seed, config.train.steps)
    held_out(config, datasets, world)
    return Stream(
        *(datasets, plan, world.rank, world.size),
        isolate_documents=config.data.isolate_documents,
        skip=config.data.skip_shards,
        pin=world.device.type == "cuda",
    )


def find_state(
    checkpoints: Checkpoints, stream: Stream, tokenizer: Tokenizer, world: dist.World
) -> tuple[Path | None, int]:
    """The checkpoint to continue from, and how many steps are done; the stream goes on from there.

    Raises ValueError when it belongs to other data or another tokenizer.
    """
    found = checkpoints.newest()
    for problem in checkpoints.passed_over:
        say(world, f"passed over a damaged checkpoint: {problem}")
    if not found:
        return None, 0
    path, progress = found
    stream.resume(progress.data, progress.step)
    saved = type(tokenizer.fingerprint)(**progress.tokenizer)
    require_same(saved, tokenizer.fingerprint, str(path), "the dataset's tokenizer")
    return path, progress.step


def make_model(config: Config, world: dist.World) -> HourglassLM:
    """The model on this rank's device, the same weights on every rank."""
    settled = choose_checkpointing(
        config.model,
        config.data.longest,
        rows=config.train.micro_batch_size,
        bytes_per_number=2 if config.train.precision == "bf16" else 4,
        packed=config.data.isolate_documents,
        budget=int((config.train.activation_memory or 0) * 2**30),
    )
    with torch.device("meta"):
        model = HourglassLM(settled)
    model.to_empty(device=world.device)
    model.init_weights(config.run.seed)
    return model


def held_out(config: Config, datasets: Sequence[Dataset], world: dist.World) -> Iterator[Batch]:
    """This rank's part of the held-out rows, every token once over all ranks."""
    data, rows = config.data, config.eval.batch_size
    return held_out_rows(
        datasets, data.seq_len, rows, world.rank, world.size, data.isolate_documents
    )


def announce(config: Config, world: dist.World, step: int) -> None:
    """Say what is about to be trained on what."""
    tokens = config.data.tokens(config.train.steps)
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
    settings or data, 75 stopped on request and saved."""
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
    except Interrupted as error:
        if dist.is_main_process():
            print(error, file=sys.stderr, flush=True)
        return EXIT_CODE
    finally:
        dist.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
