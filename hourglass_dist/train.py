"""The story of a run, top to bottom.

    torchrun --nproc-per-node 2 -m hourglass_dist.train configs/quickstart.yaml run.dir=runs/mine
    hourglass train configs/quickstart.yaml run.dir=runs/mine         the same program on one rank

Started again in the same run folder, it continues from the newest checkpoint with exactly the
batches and losses that an uninterrupted run would have had.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
from torch import nn

from hourglass_dist.checkpoint.run_folder import RunFolder
from hourglass_dist.checkpoint.save import Checkpoints, TrainingProgress
from hourglass_dist.config import schema as settings
from hourglass_dist.config.loader import print_error, to_yaml
from hourglass_dist.config.schema import Config
from hourglass_dist.core import exit_codes, ranks
from hourglass_dist.core.records import require_progress
from hourglass_dist.core.stop import Interrupted, StopRequests
from hourglass_dist.data.mixture import Dataset, make_plan, open_mixture
from hourglass_dist.data.stream import Stream
from hourglass_dist.data.tokenizer import Tokenizer, require_same
from hourglass_dist.engine.deepspeed_config import deepspeed_settings
from hourglass_dist.engine.engine import Engine, making_weights
from hourglass_dist.health.history import History, about_this_code
from hourglass_dist.health.rank_checks import require_good_folder, require_same_start
from hourglass_dist.health.watchdog import Watchdog, record_collectives
from hourglass_dist.inference.export import WarmStart
from hourglass_dist.inference.score import Score
from hourglass_dist.model.hourglass import HourglassLM
from hourglass_dist.planning.plan import settle_checkpointing, too_large
from hourglass_dist.training.evaluation import Evaluations, check_held_out
from hourglass_dist.training.guards import (
    LossSpikes,
    SkippedSteps,
    SpikeFound,
)
from hourglass_dist.training.metrics import Metrics, due
from hourglass_dist.training.profiler import Profiler
from hourglass_dist.training.writers import require_writers


@dataclass(frozen=True)
class Job:
    """Everything that the steps of a run need."""

    config: Config
    world: ranks.World
    run: RunFolder
    tokenizer: Tokenizer
    stream: Stream
    engine: Engine
    checkpoints: Checkpoints
    requests: StopRequests
    watchdog: Watchdog
    step: int
    """Steps that are done already."""
    evaluations: Evaluations
    metrics: Metrics
    profiler: Profiler
    skipped: SkippedSteps
    spikes: LossSpikes


def train(config: Config) -> None:
    """Run, or continue, the training that ``config`` describes, and note when and how it ended.

    Raises ValueError (on every rank, with the same one-line message) for anything the user can
    mend, FloatingPointError when loss or gradient stay no numbers, and Interrupted when the run was
    asked to stop: then it is saved.
    """
    with History(Path(config.run.dir)) as history:
        job = prepare(config, history)
        if job:
            run_to_the_end(job)


def run_to_the_end(job: Job) -> None:
    """All steps, from before a spike again where there was one."""
    try:
        while True:
            try:
                return run_steps(job)
            except SpikeFound as spike:
                job = go_back(job, spike)
    except (ValueError, FloatingPointError):  # raised on all ranks: a save under way can end
        job.checkpoints.wait()
        raise
    finally:
        job.watchdog.close()
        job.metrics.close()
        job.run.close()


def prepare(config: Config, history: History) -> Job | None:
    """Data, run folder, engine, the state to continue from; None when all steps are done."""
    record_collectives(Path(config.run.dir))
    # the watchdog, which writes down what hangs, comes before a collective gives up
    world = ranks.init(ranks.TIMEOUT + timedelta(minutes=config.run.hang_minutes))
    require_same_start(config, world)
    deepspeed_settings(config, world.size)  # refuses what does not fit, before anything is written
    require_writers(config.metrics.writers)
    ranks.raise_on_all_ranks(lambda: require_compiler(config, world.device), world.device)
    datasets, tokenizer = ranks.raise_on_all_ranks(lambda: open_data(config), world.device)
    stream = ranks.raise_on_all_ranks(lambda: open_stream(config, datasets, world), world.device)
    ranks.require_same_on_all_ranks(stream.identity(), world.device)
    run = RunFolder(Path(config.run.dir))
    ranks.raise_on_all_ranks(lambda: run.open(config) if world.is_main else None, world.device)
    require_good_folder(config, world)
    requests = StopRequests(run.path, config.run.time_limit_hours, world)
    about = about_this_code() | {"config": to_yaml(config)}
    checkpoints = Checkpoints(run.checkpoints, config.checkpoint, world, about)

    found = find_state(checkpoints, stream, tokenizer, world)
    path, progress = found or (None, None)
    step, guard = (progress.step, progress.guard) if progress else (0, {})
    if step >= config.train.steps:
        say(world, f"{run.path}: finished: all {config.train.steps} steps are done")
        run.close()
        return None

    def begin() -> None:
        if world.is_main:
            require_progress(run.path, step, config.run.max_fruitless_starts)
            run.record(config, tokenizer)

    ranks.raise_on_all_ranks(begin, world.device)
    history.start(step, world)
    watchdog = Watchdog(run.path, config.run.hang_minutes, world, step)
    try:
        warm = None
        if not path:
            warm = ranks.raise_on_all_ranks(lambda: warm_start(config, tokenizer), world.device)
        engine = Engine(make_model(config, world, warm), config, world)
        dry_run_step(engine, config, world)
        if path:
            engine.load(path)
        announce(config, world, step)
        return Job(
            *(config, world, run, tokenizer, stream, engine, checkpoints, requests, watchdog, step),
            evaluations=Evaluations(config, datasets, tokenizer, engine, world, watchdog.watching),
            metrics=Metrics(history, config, tokenizer.byte_lengths(), engine, world),
            profiler=Profiler(run.path, config.metrics.profiled, engine, world),
            skipped=SkippedSteps(run.path, config.train.max_skipped_steps, step, world),
            spikes=LossSpikes(config.train.spikes, guard),
        )
    except BaseException:
        watchdog.close()
        raise


def run_steps(job: Job) -> None:
    """The loop. Raises Interrupted when it was asked to stop, FloatingPointError when it must, and
    SpikeFound when it wants to go back."""
    config, metrics, stream = job.config, job.metrics, job.stream
    step, total = job.step, config.train.steps
    with closing(stream.batches(start_step=job.spikes.data_step(step))) as stored:
        batches = job.profiler.data(stored, step)
        while step < total:
            batch = ranks.raise_on_all_ranks(lambda: next(batches), job.world.device)
            with metrics.watch(step + 1), job.profiler.step(step + 1):
                result = job.engine.step(batch.rows, step, job.requests.stop_flags)
            rows = stream.rows_of(job.spikes.data_step(step))
            step += 1
            job.watchdog.step(step, result.loss)
            job.skipped.check(step, result, rows)
            metrics.record(step, result, batch, stream.epochs_read, job.skipped.total)
            job.spikes.check(step, result.loss)
            last = step == total
            stop = None if last else job.requests.reason(result.stop_flags)
            evaluate = due(step, config.eval.every) or last
            score = job.evaluations.make(step, metrics) if evaluate else None
            if due(step, config.checkpoint.every) or last or stop:
                save(job, step, score)
            if last or stop:
                job.watchdog.beat("saving")
                job.checkpoints.finish()
            for line in job.checkpoints.news():
                metrics.say(line)
            if stop:
                raise job.requests.mark_stopped(stop, step)


def go_back(job: Job, spike: SpikeFound) -> Job:
    """The run as it was at its newest checkpoint before the spike, the batches since left out.

    Raises FloatingPointError when there is none.
    """
    job.checkpoints.wait()
    found = job.checkpoints.newest(up_to=spike.good)
    if not found:
        raise FloatingPointError(f"{spike}; there is no checkpoint from before to go back to")
    path, progress = found
    job.engine.load(path)
    spikes = job.spikes.back_at(progress.step, progress.guard, spike.data_step)
    after, steps = spikes.left_out[-1]
    job.metrics.say(f"{spike}: back after step {after}, the data of {steps} steps is left out")
    job.metrics.go_back(progress.step)
    most = job.config.train.max_skipped_steps
    skipped = SkippedSteps(job.run.path, most, progress.step, job.world)
    return replace(job, step=progress.step, spikes=spikes, skipped=skipped)


def save(job: Job, step: int, score: Score | None) -> None:
    """Begin to save the state after ``step``."""
    ranks.require_same_on_all_ranks(job.stream.identity(), job.world.device)
    progress = TrainingProgress(
        step=step,
        data=job.stream.state(job.spikes.data_step(step)),
        tokenizer=asdict(job.tokenizer.fingerprint),
        stage=job.engine.stage,
        score=score.bits_per_byte if score else None,
        guard=job.spikes.state(),
    )
    job.watchdog.beat("saving")
    with job.metrics.pause("checkpoint"):
        job.checkpoints.save(job.engine.snapshot, progress)


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


def open_stream(config: Config, datasets: Sequence[Dataset], world: ranks.World) -> Stream:
    """The training rows of this rank; its share of the shards, held-out ones too, is verified."""
    plan = make_plan(datasets, config.data, config.run.seed, config.train.steps)
    check_held_out(config, datasets, world)
    return Stream(
        *(datasets, plan, world.rank, world.size),
        isolate_documents=config.data.isolate_documents,
        skip=config.data.skip_shards,
        pin=world.device.type == "cuda",
    )


def find_state(
    checkpoints: Checkpoints, stream: Stream, tokenizer: Tokenizer, world: ranks.World
) -> tuple[Path, TrainingProgress] | None:
    """The checkpoint to continue from, if there is one; the stream goes on from there.

    Raises ValueError when it belongs to other data or another tokenizer.
    """
    found = checkpoints.newest()
    for problem in checkpoints.passed_over:
        say(world, f"passed over a damaged checkpoint: {problem}")
    if found:
        path, progress = found
        read = LossSpikes(None, progress.guard).data_step(progress.step)
        stream.resume(progress.data, read)
        saved = type(tokenizer.fingerprint)(**progress.tokenizer)
        require_same(saved, tokenizer.fingerprint, str(path), "the dataset's tokenizer")
    return found


def make_model(config: Config, world: ranks.World, warm: WarmStart | None = None) -> HourglassLM:
    """The model on this rank's device, the same weights on every rank; at ZeRO stage 3 this rank's
    part of them, which never were here all at once."""
    settled = settle_checkpointing(config)
    with torch.device("meta"):
        model = HourglassLM(settled)
    making = making_weights(config, world)
    names = {module: name for name, module in model.named_modules()}

    @contextmanager
    def made(module: nn.Module) -> Iterator[None]:
        with making(module):
            yield
            if warm:
                warm.fill(names[module], module)

    model.init_weights(config.run.seed, made)
    if config.train.compile:
        model.compile_layers()
    return model


def require_compiler(config: Config, device: torch.device) -> None:
    """Raise ValueError when layers are to be compiled and there is nothing that does it."""
    compiler = os.environ.get("CXX", "g++")
    if config.train.compile and device.type == "cpu" and not shutil.which(compiler):
        raise ValueError(
            f"train.compile: needs a C++ compiler on a CPU, {compiler} is not there "
            "(Debian, Ubuntu: apt-get install g++)"
        )


def warm_start(config: Config, tokenizer: Tokenizer) -> WarmStart | None:
    """The weights to begin with, where they are not drawn.

    Raises ValueError when they are of another model or tokenizer.
    """
    if config.train.init_from is None:
        return None
    warm = WarmStart(Path(config.train.init_from), config.model)
    where = f"train.init_from: {config.train.init_from}"
    require_same(warm.fingerprint, tokenizer.fingerprint, where, "the dataset's tokenizer")
    return warm


def dry_run_step(engine: Engine, config: Config, world: ranks.World) -> None:
    """One step with the longest rows, which changes nothing: a run that will run out of memory does
    so now.

    Raises ValueError, with what to do about it, when it does.
    """
    shape = config.train.micro_batch_size, config.data.longest
    tokens_BL = torch.zeros(shape, dtype=torch.int64)
    rows = {"tokens_BL": tokens_BL, "targets_BL": tokens_BL}
    if config.data.isolate_documents:
        rows["documents_BL"] = tokens_BL
    try:
        engine.dry_run_step(rows)
    except RuntimeError as error:
        if not re.search("out of memory|can't allocate memory", str(error)):
            raise
        raise ValueError(too_large(config, world.size)) from None


def announce(config: Config, world: ranks.World, step: int) -> None:
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


def say(world: ranks.World, line: str) -> None:
    """Print once, not once a rank."""
    if world.is_main:
        print(line, flush=True)


def main(arguments: Sequence[str]) -> int:
    """``CONFIG.yaml key=value ...``; returns the exit code; 130 after Ctrl-C, unsaved."""
    try:
        if not arguments:
            raise ValueError("expected CONFIG [key=value ...], for example quickstart")
        train(settings.load(arguments[0], arguments[1:]))
    except (ValueError, OSError) as error:
        if ranks.is_main_process():
            print_error(error)
        return exit_codes.BAD_INPUT
    except FloatingPointError as error:
        if ranks.is_main_process():
            print(f"stopped: {error}", file=sys.stderr, flush=True)
        return exit_codes.FAILED
    except RuntimeError as error:
        words = ranks.lost_rank(error)
        if words is None:
            raise
        rank = os.environ.get("RANK", "0")
        print(f"rank {rank} has lost another one: {words}", file=sys.stderr, flush=True)
        return exit_codes.FAILED
    except Interrupted as error:
        if ranks.is_main_process():
            print(error, file=sys.stderr, flush=True)
        return exit_codes.STOPPED
    except KeyboardInterrupt:
        if ranks.is_main_process():
            line = "stopped by Ctrl-C, unsaved: the same command continues from the newest save"
            print(line, file=sys.stderr, flush=True)
        return 128 + signal.SIGINT
    finally:
        ranks.shutdown()
    return exit_codes.DONE


if __name__ == "__main__":
    ranks.leave(main(sys.argv[1:]))
