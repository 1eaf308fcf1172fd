"""``hourglass bench ...``: measures speeds, memory and scores, each beside a baseline."""

from __future__ import annotations

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
    """Measure time and peak memory of forward and backward, beside hourglass-transformer-pytorch
    with the same weights, and without each optimization.

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
    """Measure tokens a second of generation with the cache, beside a forward pass for each token
    and beside hourglass-transformer-pytorch.

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
    """Measure the held-out bits per byte of several models at equal training FLOPs.

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
    """Measure how fast training would read a dataset on one core, beside plain reads of its rows.

    Example: hourglass bench data data/try --seq-len 128
    """
    from hourglass_dist.bench.data import bench_data as measure

    print(measure(dataset, seq_len, batch_size, steps))
