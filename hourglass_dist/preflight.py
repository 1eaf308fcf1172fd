"""Checks of all nodes before a run is started on them, in under a minute and without training.

    torchrun --nproc-per-node 2 -m hourglass_dist.preflight quickstart

    code, settings    the same on all ranks: versions, commit, files, every setting
    devices           equally many on every node, all of one kind
    run folder        the same on all hosts, with space for the checkpoints of the run
    data              every source opens on every rank, and is the same dataset
    clocks            within a second: times of different hosts are compared in logs and heartbeats
    products          a timed matrix product on all ranks at once; slow ranks are named
    all-reduce        time of an all-reduce of 16 MiB over all ranks

The exit code is 0, or 2 after a line for each problem, with ranks and hosts. The ranks use gloo
even on GPUs (except in the timed all-reduce), so that a node without its GPU can report it.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as td

from hourglass_dist.config import schema as settings
from hourglass_dist.config.loader import print_error
from hourglass_dist.config.schema import Config
from hourglass_dist.core import exit_codes, ranks
from hourglass_dist.core.text import show_bytes
from hourglass_dist.data.mixture import open_mixture
from hourglass_dist.engine.deepspeed_config import deepspeed_settings
from hourglass_dist.health import rank_checks
from hourglass_dist.health.history import device_name
from hourglass_dist.health.rank_checks import mismatches, who
from hourglass_dist.planning.parameters import parameters_of
from hourglass_dist.planning.plan import plan

SLOW = 1.5
"""Largest time of a matrix product over the ranks' median: twice the usual difference."""
REPEATS, REPEAT_SECONDS = 5, 0.25
SKEW_SECONDS, ROUNDS = 1.0, 5
REDUCED_BYTES = 2**24


@dataclass
class Report:
    """Results of all checks, the same on all ranks."""

    notes: list[tuple[str, str]] = field(default_factory=list)
    """Name and result of each check."""
    problems: list[str] = field(default_factory=list)

    def add(self, name: str, note: str, problems: Iterable[str] = ()) -> None:
        """Add the result of a check."""
        problems = list(problems)
        self.notes.append((name, "see below" if problems else note))
        self.problems += problems


@dataclass(frozen=True)
class RankGroup:
    """Ranks that make the checks together."""

    config: Config
    world: ranks.World
    """World of a process group on the CPU."""
    device: torch.device
    """Device on which this rank would train."""
    hosts: list[str]

    def texts(self, text: str) -> list[str]:
        """Return the text of every rank."""
        return ranks.gather_texts(text, self.world.device)

    def floats(self, value: float) -> list[float]:
        """Return the value of every rank."""
        return [each for (each,) in ranks.gather_floats([value], self.world.device)]

    def each(self, action: Callable[[], str]) -> tuple[list[str], list[str]]:
        """Return the result of ``action`` on all ranks, and a line per error with its ranks."""
        result, mistake = "", ""
        try:
            result = action()
        except (ValueError, OSError) as error:
            mistake = str(error) or type(error).__name__
        mistakes = self.texts(mistake)
        lines = []
        for text in dict.fromkeys(text for text in mistakes if text):
            ranks = [rank for rank, theirs in enumerate(mistakes) if theirs == text]
            lines.append(f"{who(ranks, self.hosts)}: {text}")
        return self.texts(result), lines


def check_nodes(config: Config) -> tuple[Report, RankGroup]:
    """Make all checks and return the report; when code or settings differ, stop after those."""
    world = ranks.init(on_cpu=True)
    local = int(os.environ.get("LOCAL_RANK", "0"))
    has_gpu = local < torch.cuda.device_count()
    device = torch.device("cuda", local) if has_gpu else torch.device("cpu")
    group = RankGroup(config, world, device, rank_checks.hosts_of(world))
    report = Report()
    check_code(group, report)
    if report.problems:
        return report, group  # with other code or settings the checks would differ
    check_devices(group, report)
    check_folder(group, report)
    check_data(group, report)
    check_clocks(group, report)
    check_products(group, report)
    check_all_reduce(group, report)
    return report, group


def check_code(group: RankGroup, report: Report) -> None:
    """Check versions, source files and settings."""
    code = rank_checks.code()
    told = ", ".join(f"{name} {value}" for name, value in code.items() if value)
    report.add("code", told, rank_checks.other_code(group.world, group.hosts))
    other = rank_checks.other_settings(group.config, group.world, group.hosts)

    def divide() -> str:
        trained = parameters_of(group.config.model).trained
        deepspeed_settings(group.config, group.world.size, trained)
        return ""

    if not other:
        other = group.each(divide)[1]
    report.add("settings", "the same on all ranks", other)


def check_devices(group: RankGroup, report: Report) -> None:
    """Check that every node has equally many ranks and devices, all of one kind."""
    size = len(group.hosts)
    kind = device_name(group.device)
    ranks_here = [f"{group.hosts.count(host)} a node" for host in group.hosts]
    gpus = group.texts(f"{torch.cuda.device_count()} GPUs")
    problems = [
        *mismatches("ranks", ranks_here, group.hosts),
        *mismatches("device", group.texts(kind), group.hosts),
        *mismatches("devices of a node", gpus, group.hosts),
    ]
    nodes = len(set(group.hosts))
    report.add("devices", f"{size // nodes} x {kind} on each node", problems)


def check_folder(group: RankGroup, report: Report) -> None:
    """Check that all hosts share the run folder and it has space; remove what the check made."""
    config, world = group.config, group.world
    folder = Path(config.run.dir)
    missing: list[Path] = []
    if world.is_main:  # it must be made before other hosts look at it
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
    mistakes = group.each(lambda: make(folder) if world.is_main else "")[1]
    mistakes = mistakes or rank_checks.not_shared(folder, world, group.hosts)
    there = list(folder.glob("checkpoints/step_*")) if world.is_main else []
    count = max(1, rank_checks.kept(config) - int(sum(group.floats(len(there)))))
    size = plan(config, world.size).checkpoint_bytes
    mistakes += rank_checks.no_room(config, world, count, size)
    note = ""
    if world.is_main:
        free, need = rank_checks.free_bytes(folder), count * size
        note = (
            f"{folder}: seen by all; {show_bytes(free)} are free, {show_bytes(need)} needed for "
            f"{count} checkpoint{'s' if count > 1 else ''}"
        )
        for path in missing:
            if path.exists() and not any(path.iterdir()):
                path.rmdir()
    report.add("run folder", note, mistakes)


def make(folder: Path) -> str:
    """Make a folder and its parents, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder)


def check_data(group: RankGroup, report: Report) -> None:
    """Check that every source opens on all ranks with the same manifest."""

    def ids() -> str:
        datasets, _ = open_mixture(group.config.data)
        return json.dumps({d.where: d.manifest.dataset_id for d in datasets})

    everyone, mistakes = group.each(ids)
    note = ""
    if not mistakes:
        known = [json.loads(text) for text in everyone]
        for where in known[0]:
            of_ranks = [of_rank[where][:12] for of_rank in known]
            mistakes += mismatches(f"the manifest of {where}", of_ranks, group.hosts)
        sources = ", ".join(f"{where} ({known[0][where][:12]})" for where in known[0])
        note = f"{sources}, the same on all ranks"
    report.add("data", note, mistakes)


def check_clocks(group: RankGroup, report: Report) -> None:
    """Compare clocks with rank 0, by medians after barriers that all leave within milliseconds."""
    rounds = []
    for _ in range(ROUNDS):
        ranks.barrier()
        times = group.floats(time.time())
        rounds.append([mine - times[0] for mine in times])
    skews = [statistics.median(of_rank) for of_rank in zip(*rounds, strict=True)]
    worst = max(map(abs, skews))
    problems = []
    if off := [rank for rank, skew in enumerate(skews) if abs(skew) > SKEW_SECONDS]:
        problems = [
            f"clocks differ by {worst:.1f} s: {who(off, group.hosts)} from "
            f"{who([0], group.hosts)}; is time synchronised (chrony, NTP)?"
        ]
    report.add("clocks", f"within {max(worst, 0.001):.3f} s of rank 0", problems)


def check_products(group: RankGroup, report: Report) -> None:
    """Time a matrix product on all ranks at once; the best of a few repeats counts, so that a brief
    disturbance does not make a rank slow."""
    size, kind = (8192, torch.bfloat16) if group.device.type == "cuda" else (512, torch.float32)
    matrix = torch.rand(size, size, dtype=torch.float32).to(group.device, kind)
    times = []
    for _ in range(REPEATS + 1):
        ranks.barrier()
        times.append(seconds_of(matrix))
    mine = min(times[1:])  # the first one warms up
    speeds = [2 * size**3 / seconds for seconds in group.floats(mine)]
    median = statistics.median_high(speeds)
    problems = [
        f"{who([rank], group.hosts)} is slow: {show_flops(speed)} in a matrix product, the best of "
        f"{REPEATS}, where the median of all ranks is {show_flops(median)}"
        for rank, speed in enumerate(speeds)
        if speed * SLOW < median
    ]
    spread = f"{show_flops(min(speeds))} to {show_flops(max(speeds))}"
    report.add("products", f"{spread}, median {show_flops(median)}", problems)


def seconds_of(matrix: torch.Tensor) -> float:
    """Return the mean seconds of a product of a matrix with itself, over a quarter of a second."""
    begun, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - begun < REPEAT_SECONDS:
        torch.mm(matrix, matrix)
        count += 1
        if matrix.device.type == "cuda":
            torch.cuda.synchronize(matrix.device)
    return (time.perf_counter() - begun) / count


def show_flops(speed: float) -> str:
    """Return a speed as text, such as ``41.3 GFLOP/s``."""
    return f"{speed / 1e12:.3g} TFLOP/s" if speed >= 1e12 else f"{speed / 1e9:.3g} GFLOP/s"


def check_all_reduce(group: RankGroup, report: Report) -> None:
    """Time an all-reduce of two ranks or more, over nccl if all have GPUs; name no slow rank."""
    world = group.world
    if world.size == 1:
        return
    on_gpus = all(kind == "cuda" for kind in group.texts(group.device.type))
    nccl = td.new_group(backend="nccl") if on_gpus else None
    device = group.device if on_gpus else world.device
    if on_gpus:
        torch.cuda.set_device(device)
    tensor = torch.ones(REDUCED_BYTES // 4, device=device)
    times = []
    for _ in range(REPEATS + 1):
        ranks.barrier()
        begun = time.perf_counter()
        td.all_reduce(tensor, group=nccl)
        float(tensor[0])  # wait for the result
        tensor.fill_(1.0)
        times.append(time.perf_counter() - begun)
    seconds = statistics.median(group.floats(statistics.median(times[1:])))
    sent = 2 * (world.size - 1) / world.size * REDUCED_BYTES
    over = "nccl" if on_gpus else "gloo"
    report.add(
        "all-reduce",
        f"{show_bytes(REDUCED_BYTES)} over {over} in {1e3 * seconds:.1f} ms: a rank sends "
        f"{show_bytes(round(sent / seconds))}/s",
    )


def print_report(report: Report, group: RankGroup, seconds: float) -> None:
    """Print the report, on the main rank."""
    nodes = list(dict.fromkeys(group.hosts))
    shown = ", ".join(nodes[:8]) + (", ..." if len(nodes) > 8 else "")
    size = len(group.hosts)
    print(
        f"preflight: {len(nodes)} node{'s' * (len(nodes) > 1)} ({shown}), {size} "
        f"rank{'s' * (size > 1)}, {seconds:.1f} s"
    )
    for name, text in report.notes:
        print(f"  {name:<12}{text}")
    print("all is well" if not report.problems else f"{len(report.problems)} problems", flush=True)


def main(arguments: Sequence[str]) -> int:
    """Run the checks for ``CONFIG.yaml key=value ...`` and return the exit code."""
    begun = time.monotonic()
    try:
        report, group = check_nodes(settings.load(arguments[0], arguments[1:]))
        if group.world.is_main:
            print_report(report, group, time.monotonic() - begun)
            if report.problems:
                print_error(ValueError("\n".join(report.problems)))
        ranks.barrier()  # until the report is printed
        return exit_codes.BAD_INPUT if report.problems else exit_codes.DONE
    except (ValueError, OSError) as error:
        if ranks.is_main_process():
            print_error(error)
        return exit_codes.BAD_INPUT
    finally:
        ranks.shutdown()


if __name__ == "__main__":
    if len(sys.argv) < 2:
        print_error(ValueError("expected CONFIG.yaml [key=value ...]"))
        sys.exit(exit_codes.BAD_INPUT)
    ranks.leave(main(sys.argv[1:]))
