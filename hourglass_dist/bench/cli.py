"""``hourglass bench ...``: speeds, memory and scores, each beside what it is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Measure speed, memory and scores.")

Repeats = Annotated[int, typer.Option(help="Times that every variant runs, in turn.", min=1)]
Threads = Annotated[int | None, typer.Option(help="Threads of PyTorch; its own choice without.")]
Device = Annotated[str, typer.Option(help="cpu or cuda; auto takes a GPU where there is one.")]
Quick = Annotated[bool, typer.Option(help="Tiny sizes: to see that it works.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write all figures here, too.")]


@app.command("model")
def model(
    repeats: Repeats = 5,
    threads: Threads = None,
    device: Device = "auto",
    quick: Quick = False,
    checkpointing: Annotated[
        bool, typer.Option(help="Activation memory and time of every policy at every level.")
    ] = False,
    json_file: Json = None,
) -> None:
    """Time and peak memory of forward and backward, beside hourglass-transformer-pytorch with the
    same weights, and without each of the rewrites.

    Example: hourglass bench model --repeats 3 --threads 2
    """
    from hourglass_dist.bench.model import bench_model
    from hourglass_dist.bench.shared import write

    facts, rows = bench_model(repeats, threads, device, quick, checkpointing)
    write(json_file, facts, rows)


@app.command("decode")
def decode(
    config: Annotated[Path, typer.Option(help="A second model to measure.")] = Path("modern"),
    repeats: Repeats = 3,
    threads: Threads = None,
    device: Device = "auto",
    quick: Quick = False,
    json_file: Json = None,
) -> None:
    """Tokens a second of generation with the cache, beside a forward pass a token and beside
    hourglass-transformer-pytorch.

    Example: hourglass bench decode --repeats 3
    """
    from hourglass_dist.bench.decode import bench_decode
    from hourglass_dist.bench.shared import write

    facts, rows = bench_decode(repeats, threads, device, quick, config)
    write(json_file, facts, rows)


@app.command("compare")
def compare(
    arms: Annotated[Path, typer.Argument(help="A folder of arms, one YAML file each.")] = Path(
        "compare"
    ),
    data: Annotated[Path, typer.Option(help="A dataset with a held-out split.")] = Path(
        "data/tinyshakespeare"
    ),
    flops: Annotated[float, typer.Option(help="Training FLOPs of every run.", min=1.0)] = 2e12,
    rows: Annotated[int, typer.Option(help="Rows in a batch.", min=1)] = 8,
    length: Annotated[int, typer.Option(help="Tokens in a row.", min=1)] = 256,
    seeds: Annotated[int, typer.Option(help="Scored runs of every arm.", min=2)] = 3,
    jobs: Annotated[int, typer.Option(help="Runs side by side.", min=1)] = 2,
    out: Annotated[Path, typer.Option(help="Results, a line for each run.")] = Path(
        "runs/compare.jsonl"
    ),
    dry_run: Annotated[bool, typer.Option(help="Only print what would be run.")] = False,
) -> None:
    """Held-out bits per byte of several models at equal training FLOPs.

    Example: hourglass bench compare --data data/try --dry-run
    """
    from hourglass_dist.bench.compare import Budget, bench_compare

    bench_compare(arms, Budget(data, flops, rows, length), seeds, jobs, out, dry_run)


@app.command("data")
def bench_data(
    dataset: Annotated[str, typer.Argument(help="A dataset: a folder, or its address.")],
    seq_len: Annotated[int, typer.Option(help="Tokens in a row.", min=1)] = 2048,
    batch_size: Annotated[int, typer.Option(help="Rows in a batch of one rank.", min=1)] = 64,
    steps: Annotated[int, typer.Option(help="Batches in a round.", min=1)] = 100,
) -> None:
    """Say how fast training would read a dataset on one core, and how fast the machine could.

    Example: hourglass bench data data/try --seq-len 128
    """
    from hourglass_dist.bench.data import bench_data as measure

    print(measure(dataset, seq_len, batch_size, steps))


@app.command("save")
def save(
    folder: Annotated[
        Path, typer.Option(help="An existing folder on the disk to be measured.")
    ] = Path(),
    millions: Annotated[int, typer.Option(help="Millions of parameters.", min=1)] = 200,
    repeats: Repeats = 5,
    json_file: Json = None,
) -> None:
    """How long training stands still for a checkpoint, and takes to come back from one.

    Example: hourglass bench save --millions 20 --repeats 3
    """
    from hourglass_dist.bench.save import bench_save
    from hourglass_dist.bench.shared import write

    facts, rows = bench_save(folder, millions, repeats)
    write(json_file, facts, rows)


@app.command("zero")
def zero(
    ranks: Annotated[str, typer.Option(help="Numbers of ranks, with commas.")] = "1,2,4",
    stages: Annotated[str, typer.Option(help="ZeRO stages, with commas.")] = "0,1,2,3",
    precisions: Annotated[str, typer.Option(help="fp32, bf16 or both.")] = "fp32,bf16",
    accumulation: Annotated[str, typer.Option(help="Forward passes of a step.")] = "1,4",
    json_file: Json = None,
) -> None:
    """Memory of a rank and what it sends, as measured on CPU ranks beside 'hourglass plan'.

    Example: hourglass bench zero --ranks 2 --stages 2,3
    """
    from hourglass_dist.bench.shared import machine, prepare, write
    from hourglass_dist.bench.zero import bench_zero

    rows = bench_zero(
        numbers("--ranks", ranks, 1, 64),
        numbers("--stages", stages, 0, 3),
        words("--precisions", precisions, ("fp32", "bf16")),
        numbers("--accumulation", accumulation, 1, 64),
    )
    write(json_file, machine(prepare("cpu", 1)), rows)


@app.command("loop")
def loop(
    config: Annotated[Path, typer.Argument(help="Settings with a dataset that is there.")] = Path(
        "configs/quickstart.yaml"
    ),
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings to change.")] = None,
    ranks: Annotated[str, typer.Option(help="Numbers of ranks, with commas.")] = "1,2",
    steps: Annotated[int, typer.Option(help="Steps that count.", min=1)] = 100,
    json_file: Json = None,
) -> None:
    """A step of training, with stream, checks and metrics, beside a step of a bare loop of the same
    model: DeepSpeed's engine alone, and on one rank PyTorch alone.

    Example: hourglass bench loop configs/quickstart.yaml --steps 50
    """
    from hourglass_dist.bench.loop import bench_loop
    from hourglass_dist.bench.shared import machine, prepare, write

    rows = bench_loop(config, overrides or (), numbers("--ranks", ranks, 1, 64), steps)
    write(json_file, machine(prepare("cpu", 1)), rows)


@app.command("scale")
def scale(
    config: Annotated[Path, typer.Argument(help="Settings of the run.")] = Path(
        "configs/large_zero3.yaml"
    ),
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings to change.")] = None,
    gpu: Annotated[str, typer.Option(help="Kind of accelerator, eight in a node.")] = "h100",
    ranks: Annotated[str, typer.Option(help="Numbers of ranks, with commas.")] = (
        "64,256,512,1024,4096"
    ),
    failures: Annotated[int, typer.Option(help="Failures in a simulation.", min=100)] = 3000,
    seed: Annotated[int, typer.Option(help="Of the simulation.", min=0)] = 0,
    count: Annotated[
        str, typer.Option(help="Count a twin's traffic on so many CPU ranks, too.")
    ] = "",
    json_file: Json = None,
) -> None:
    """One run on more and more accelerators, on paper: a step at every ZeRO stage, checkpoints,
    failures and how often to save.

    Example: hourglass bench scale configs/large_zero3.yaml --ranks 64,1024
    """
    from hourglass_dist.bench.scale import bench_scale
    from hourglass_dist.bench.shared import write

    counts = numbers("--ranks", ranks, 8, 65_536)
    live = numbers("--count", count, 2, 64) if count else []
    rows = bench_scale(config, overrides or (), gpu, counts, failures, seed, live)
    write(json_file, {"seed": seed, "failures": failures}, rows)


@app.command("store")
def store(
    clients: Annotated[str, typer.Option(help="Numbers of clients, with commas.")] = "16,64,256",
    repeats: Repeats = 5,
    json_file: Json = None,
) -> None:
    """What the store through which ranks meet can do on this machine: connections, barriers, and
    the notes of a checkpoint.

    Example: hourglass bench store --clients 16,64 --repeats 3
    """
    from hourglass_dist.bench.shared import machine, prepare, write
    from hourglass_dist.bench.store import bench_store

    rows = bench_store(numbers("--clients", clients, 2, 16_384), repeats)
    write(json_file, machine(prepare("cpu", 1)), rows)


def numbers(option: str, text: str, least: int, most: int) -> list[int]:
    """Whole numbers between two, written with commas. Raises ValueError for anything else."""
    return [int(n) for n in words(option, text, [str(n) for n in range(least, most + 1)])]


def words(option: str, text: str, known: Sequence[str]) -> list[str]:
    """Some of ``known``, written with commas. Raises ValueError for anything else."""
    given = [word.strip() for word in text.split(",")]
    for word in given:
        if word not in known:
            expected = f"{known[0]} to {known[-1]}" if len(known) > 4 else ", ".join(known)
            raise ValueError(f"{option}: expected {expected}, with commas, given {text!r}")
    return given
