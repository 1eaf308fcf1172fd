"""The training program: what every rank of a run executes, top to bottom.

    torchrun --nproc-per-node 2 -m hourglass_dist.train configs/quickstart.yaml run.dir=runs/mine
    hourglass train configs/quickstart.yaml run.dir=runs/mine         the same program on one rank

Started again in the same run folder, it continues from the newest checkpoint, with exactly the
batches and losses of an uninterrupted run.
"""

from __future__ import annotations

import os
import re
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
from hourglass_dist.health.history import History, about_this_code, device_name
from hourglass_dist.health.rank_checks import (
    require_compiler,
    require_good_folder,
    require_same_start,
)
from hourglass_dist.health.watchdog import Watchdog, record_collectives
from hourglass_dist.inference.export import WarmStart
from hourglass_dist.inference.score import Score
from hourglass_dist.model.hourglass import HourglassLM
from hourglass_dist.planning.devices import peak_flops
from hourglass_dist.planning.plan import Plan, plan, settle_checkpointing, too_large
from hourglass_dist.planning.render import render_plan
from hourglass_dist.training.evaluation import Evaluations, check_held_out
from hourglass_dist.training.guards import LossSpikes, SkippedSteps, SpikeFound
from hourglass_dist.training.metrics import Metrics, due
from hourglass_dist.training.profiler import Profiler
from hourglass_dist.training.throughput import Throughput
from hourglass_dist.training.writers import require_writers


@dataclass(frozen=True)
class TrainingRun:
    """A run in progress: all objects that its steps use."""

    config: Config
    world: ranks.World
    folder: RunFolder
    tokenizer: Tokenizer
    stream: Stream
    engine: Engine
    checkpoints: Checkpoints
    requests: StopRequests
    watchdog: Watchdog
    step: int
    """Number of optimizer steps completed before this start."""
    evaluations: Evaluations
    metrics: Metrics
    profiler: Profiler
    skipped: SkippedSteps
    spikes: LossSpikes


def train(config: Config) -> None:
    """Start or continue the run that ``config`` describes, and record when and how it ended.

    Raises ValueError (on every rank, with the same one-line message) for anything the user can
    correct, FloatingPointError when loss or gradient stay NaN or infinite, and Interrupted when the
    run was asked to stop and is saved.
    """
    with History(Path(config.run.dir)) as history:
        run = prepare(config, history)
        if run:
            run_all_steps(run)


def run_all_steps(run: TrainingRun) -> None:
    """Take all steps; after a loss spike, return to the checkpoint before it and continue."""
    try:
        while True:
            try:
                return run_steps(run)
            except SpikeFound as spike:
                run = go_back(run, spike)
    except (ValueError, FloatingPointError):  # raised on all ranks, so a running save can end
        run.checkpoints.wait()
        raise
    finally:
        run.watchdog.close()
        run.metrics.close()
        run.folder.close()


def prepare(config: Config, history: History) -> TrainingRun | None:
    """Open data and run folder, make the engine and load the state; None if all steps are done."""
    record_collectives(Path(config.run.dir))
    # longer than the watchdog, which must first write the stacks of a hang
    world = ranks.init(ranks.TIMEOUT + timedelta(minutes=config.run.hang_minutes))
    require_same_start(config, world)
    given, cost = config, find_cost(config, world)
    config = cost.config
    require_writers(config.metrics.writers)
    ranks.raise_on_all_ranks(lambda: require_compiler(config, world.device), world.device)
    datasets, tokenizer = ranks.raise_on_all_ranks(lambda: open_data(config), world.device)
    stream = ranks.raise_on_all_ranks(lambda: open_stream(config, datasets, world), world.device)
    ranks.require_same_on_all_ranks(stream.identity(), world.device)
    folder = RunFolder(Path(config.run.dir))
    ranks.raise_on_all_ranks(lambda: folder.open(given) if world.is_main else None, world.device)
    require_good_folder(config, world, cost.checkpoint_bytes)
    requests = StopRequests(folder.path, config.run.time_limit_hours, world)
    about = about_this_code() | {"config": to_yaml(given)}
    checkpoints = Checkpoints(folder.checkpoints, config.checkpoint, world, about)

    path, progress = find_state(checkpoints, stream, tokenizer, world) or (None, None)
    step, guard = (progress.step, progress.guard) if progress else (0, {})
    if step >= config.train.steps:
        say(world, f"{folder.path}: finished: all {config.train.steps} steps are done")
        folder.close()
        return None

    ranks.raise_on_all_ranks(lambda: begin(folder, given, tokenizer, step, world), world.device)
    history.start(step, world)
    watchdog = Watchdog(folder.path, config.run.hang_minutes, world, step)
    try:
        warm = None
        if not path:
            warm = ranks.raise_on_all_ranks(lambda: warm_start(config, tokenizer), world.device)
        engine = Engine(make_model(config, world, warm), config, world)
        dry_run_step(engine, config, world)
        if path:
            engine.load(path)
        announce(config, world, step)
        return TrainingRun(
            config,
            world,
            folder,
            tokenizer,
            stream,
            engine,
            checkpoints,
            requests,
            watchdog,
            step,
            evaluations=Evaluations(config, datasets, tokenizer, engine, world, watchdog.watching),
            metrics=make_metrics(cost, history, tokenizer, engine, world),
            profiler=Profiler(folder.path, config.metrics.profiled, engine, world),
            skipped=SkippedSteps(folder.path, config.train.max_skipped_steps, step, world),
            spikes=LossSpikes(config.train.spikes, guard),
        )
    except BaseException:
        watchdog.close()
        raise


def find_cost(config: Config, world: ranks.World) -> Plan:
    """Choose the activation checkpointing and return the run's cost (FLOPs, memory, sizes).

    Raises ValueError, before anything is written, if ranks or activation memory do not suffice.
    """
    cost = plan(settle_checkpointing(config, world.device.type), world.size)
    deepspeed_settings(config, world.size, cost.parameters.trained)
    return cost


def begin(
    folder: RunFolder, config: Config, tokenizer: Tokenizer, step: int, world: ranks.World
) -> None:
    """Write the settings on the main rank. Raises ValueError if earlier starts got no further."""
    if world.is_main:
        require_progress(folder.path, step, config.run.max_fruitless_starts)
        folder.record(config, tokenizer)


def make_metrics(
    cost: Plan, history: History, tokenizer: Tokenizer, engine: Engine, world: ranks.World
) -> Metrics:
    """Return the recorder of the steps of a run of this cost."""
    precision = cost.config.train.precision
    # the table has peak FLOP/s for bf16 only
    peak = peak_flops(device_name(world.device)) if precision == "bf16" else None
    throughput = Throughput(world.size, cost.flops_per_token, peak)
    lengths, text = tokenizer.byte_lengths(), render_plan(cost)
    return Metrics(history, cost.config, lengths, engine, world, throughput, text)


def run_steps(run: TrainingRun) -> None:
    """Run the training loop. Raises Interrupted when it was asked to stop, FloatingPointError when
    too many steps are NaN or infinite, and SpikeFound when the run must go back."""
    config, metrics, stream = run.config, run.metrics, run.stream
    step, total = run.step, config.train.steps
    with closing(stream.batches(start_step=run.spikes.data_step(step))) as stored:
        batches = run.profiler.data(stored, step)
        while step < total:
            batch = ranks.raise_on_all_ranks(lambda: next(batches), run.world.device)
            with metrics.watch(step + 1), run.profiler.step(step + 1):
                result = run.engine.step(batch.rows, step, run.requests.stop_flags)
            rows = stream.rows_of(run.spikes.data_step(step))
            step += 1
            run.watchdog.step(step, result.loss)
            run.skipped.check(step, result, rows)
            metrics.record(step, result, batch, stream.epochs_read, run.skipped.total)
            run.spikes.check(step, result.loss)
            last = step == total
            stop = None if last else run.requests.reason(result.stop_flags)
            evaluate = due(step, config.eval.every) or last
            score = run.evaluations.make(step, metrics) if evaluate else None
            if due(step, config.checkpoint.every) or last or stop:
                save(run, step, score)
            if last or stop:
                run.watchdog.beat("saving")
                run.checkpoints.finish()
            for line in run.checkpoints.news():
                metrics.say(line)
            if stop:
                raise run.requests.mark_stopped(stop, step)


def go_back(run: TrainingRun, spike: SpikeFound) -> TrainingRun:
    """Return the run at its newest checkpoint before the spike, without the batches since then.

    Raises FloatingPointError when there is no such checkpoint.
    """
    run.checkpoints.wait()
    saved = run.checkpoints.newest(up_to=spike.good)
    if not saved:
        raise FloatingPointError(f"{spike}; there is no checkpoint from before to go back to")
    path, progress = saved
    run.engine.load(path)
    spikes = run.spikes.back_at(progress.step, progress.guard, spike.data_step)
    after, steps = spikes.left_out[-1]
    run.metrics.say(f"{spike}: back after step {after}, the data of {steps} steps is left out")
    run.metrics.go_back(progress.step)
    most = run.config.train.max_skipped_steps
    skipped = SkippedSteps(run.folder.path, most, progress.step, run.world)
    return replace(run, step=progress.step, spikes=spikes, skipped=skipped)


def save(run: TrainingRun, step: int, score: Score | None) -> None:
    """Start a save of the state after ``step``."""
    ranks.require_same_on_all_ranks(run.stream.identity(), run.world.device)
    progress = TrainingProgress(
        step=step,
        data=run.stream.state(run.spikes.data_step(step)),
        tokenizer=asdict(run.tokenizer.fingerprint),
        stage=run.engine.stage,
        score=score.bits_per_byte if score else None,
        guard=run.spikes.state(),
    )
    run.watchdog.beat("saving")
    with run.metrics.pause("checkpoint"):
        run.checkpoints.save(run.engine.snapshot, progress)


def open_data(config: Config) -> tuple[list[Dataset], Tokenizer]:
    """Open the datasets and their tokenizer. Raises ValueError when they do not fit each other or
    the model."""
    datasets, tokenizer = open_mixture(config.data)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"model.vocab_size: the tokenizer of {datasets[0].where} has {tokenizer.vocab_size} "
            f"ids, given {config.model.vocab_size}"
        )
    return datasets, tokenizer


def open_stream(config: Config, datasets: Sequence[Dataset], world: ranks.World) -> Stream:
    """Open this rank's training rows, and verify its share of all shards, held-out ones too."""
    plan = make_plan(datasets, config.data, config.run.seed, config.train.steps)
    check_held_out(config, datasets, world)
    return Stream(
        datasets,
        plan,
        world.rank,
        world.size,
        isolate_documents=config.data.isolate_documents,
        skip=config.data.skip_shards,
        pin=world.device.type == "cuda",
    )


def find_state(
    checkpoints: Checkpoints, stream: Stream, tokenizer: Tokenizer, world: ranks.World
) -> tuple[Path, TrainingProgress] | None:
    """Return the checkpoint to resume from, or None, and set the stream to its position.

    Raises ValueError when it belongs to other data or another tokenizer.
    """
    newest = checkpoints.newest()
    for problem in checkpoints.passed_over:
        say(world, f"passed over a damaged checkpoint: {problem}")
    if newest:
        path, progress = newest
        read = LossSpikes(None, progress.guard).data_step(progress.step)
        stream.resume(progress.data, read)
        saved = type(tokenizer.fingerprint)(**progress.tokenizer)
        require_same(saved, tokenizer.fingerprint, str(path), "the dataset's tokenizer")
    return newest


def make_model(config: Config, world: ranks.World, warm: WarmStart | None = None) -> HourglassLM:
    """Return the model on this rank's device, with the same weights on every rank. At ZeRO stage 3
    memory holds only this rank's part and one whole module at a time."""
    with torch.device("meta"):
        model = HourglassLM(config.model)
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


def warm_start(config: Config, tokenizer: Tokenizer) -> WarmStart | None:
    """Return the weights of ``train.init_from``; None if it is not set.

    Raises ValueError when they belong to another model or tokenizer.
    """
    if config.train.init_from is None:
        return None
    warm = WarmStart(Path(config.train.init_from), config.model)
    where = f"train.init_from: {config.train.init_from}"
    require_same(warm.fingerprint, tokenizer.fingerprint, where, "the dataset's tokenizer")
    return warm


def dry_run_step(engine: Engine, config: Config, world: ranks.World) -> None:
    """Take one step with the longest rows that changes nothing, to detect out-of-memory early.

    Raises ValueError, with advice, when memory is not enough.
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
        raise ValueError(too_large(config, world.size, world.device.type)) from None


def announce(config: Config, world: ranks.World, step: int) -> None:
    """Print model, ranks, precision, steps and tokens of the run, on the main rank."""
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
    """Print ``line`` on the main rank only."""
    if world.is_main:
        print(line, flush=True)


def main(arguments: Sequence[str]) -> int:
    """Run ``CONFIG.yaml key=value ...`` and return the exit code; 130 after Ctrl-C, unsaved."""
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
