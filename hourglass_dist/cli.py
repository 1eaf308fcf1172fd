"""Commands of ``hourglass``. Each one parses its arguments and calls the module that does the
work."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from data_tools.cli import app as data_app
from data_tools.cli import bench_prepare
from hourglass_dist.bench.cli import app as bench_app
from hourglass_dist.config import schema as settings
from hourglass_dist.config import shipped
from hourglass_dist.config.describe import describe as describe_settings
from hourglass_dist.config.loader import print_error, to_yaml
from hourglass_dist.core import exit_codes
from hourglass_dist.core.version import __version__

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.add_typer(data_app, name="data")
app.add_typer(bench_app, name="bench")
checkpoint_app = typer.Typer(no_args_is_help=True, help="A run's checkpoints: what there is.")
app.add_typer(checkpoint_app, name="checkpoint")
bench_app.command("prepare")(bench_prepare)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(f"hourglass_dist {__version__}")
        raise typer.Exit


@app.callback()
def hourglass(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print it.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """Pretrain hourglass language models: from a raw corpus to an exported checkpoint.

    Example: hourglass config quickstart
    """


ConfigFile = Annotated[
    Path, typer.Argument(help="A YAML file, or the name of shipped settings such as quickstart.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Settings to change, such as train.steps=100 model.levels.1.layers=6."),
]
Export = Annotated[Path, typer.Argument(help="A folder made by 'hourglass export'.")]


@app.command()
def train(config: ConfigFile, overrides: Overrides = None) -> None:
    """Start, or continue, the training run of a settings file, on one rank.

    To train on every GPU, or on two CPU ranks: hourglass launch torchrun CONFIG ...

    Example:

    hourglass train quickstart data.dataset=data/try run.dir=runs/try
    """
    from hourglass_dist.train import main as train_main

    raise typer.Exit(train_main([str(config), *(overrides or [])]))


@app.command()
def launch(
    target: Annotated[
        Literal["torchrun", "ssh", "slurm", "k8s"],
        typer.Argument(help="Where to: this node, the nodes of a hostfile, a queue, a cluster."),
    ],
    config: ConfigFile,
    overrides: Overrides = None,
    cluster: Annotated[
        Path, typer.Option(help="What the machines are like: a file; 'cluster' is the shipped one.")
    ] = Path("cluster"),
    print_only: Annotated[
        bool, typer.Option("--print", help="Show what would be run, and run nothing.")
    ] = False,
    preflight_only: Annotated[
        bool, typer.Option("--preflight-only", help="Look whether all nodes are fit, no training.")
    ] = False,
) -> None:
    """Start, or continue, a training run on one or more nodes.

    Settings are checked first. docs/clusters.md describes what each target needs.

    Example: hourglass launch torchrun quickstart --print
    """
    from hourglass_dist.launch import cluster as clusters
    from hourglass_dist.launch import targets

    config = shipped.find(config)
    loaded = settings.load(config, overrides or ())
    machines = targets.counted(target, clusters.load_cluster(cluster))
    clusters.require_ranks(machines, loaded)
    arguments = [str(config), *(overrides or [])]
    request = targets.Request(machines, loaded, arguments, preflight_only)
    found = targets.TARGETS[target](request)
    if print_only:
        print(targets.show(found), end="")
    else:
        raise typer.Exit(targets.start(found))


@app.command()
def config(
    config: Annotated[
        str | None,
        typer.Argument(help="A YAML file or the name of shipped settings; a key for --describe."),
    ] = None,
    overrides: Overrides = None,
    describe: Annotated[
        bool, typer.Option("--describe", help="Say what a setting, or every setting, means.")
    ] = False,
) -> None:
    """Print the resolved settings with all defaults filled in, or one line for each mistake.

    Example: hourglass config quickstart optim.lr=1e-3

    Example: hourglass config --describe model.levels
    """
    if describe:
        print(describe_settings(settings.Config, config or ""), end="")
    elif config is None:
        raise ValueError("expected CONFIG, such as quickstart, or --describe [KEY]")
    else:
        print(to_yaml(settings.load(config, overrides or ())), end="")


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    world_size: Annotated[int, typer.Option(help="Ranks that would train.", min=1)] = 1,
    gpu: Annotated[
        str | None, typer.Option(help="Forecast time and cost on these, such as h100.")
    ] = None,
    nodes: Annotated[int, typer.Option(help="With --gpu: machines.", min=1)] = 1,
    gpus_per_node: Annotated[int, typer.Option(help="With --gpu: in each.", min=1)] = 8,
    price: Annotated[
        float | None, typer.Option(help="With --gpu: dollars an hour of one, not the listed.")
    ] = None,
) -> None:
    """Show the cost of a run before it is started: parameters, FLOPs, memory and traffic of a
    rank; with --gpu also whether it fits, its time and price, and faster settings.

    Activations are counted for the kernels of GPUs with --gpu, else for those of this machine.

    Example: hourglass plan large_zero3 --gpu h100 --nodes 8
    """
    import torch

    from hourglass_dist.planning import forecast
    from hourglass_dist.planning.plan import plan as make_plan
    from hourglass_dist.planning.render import render_forecast, render_plan

    loaded = settings.load(config, overrides or ())
    if gpu is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        print(render_plan(make_plan(loaded, world_size, device)), end="")
        return
    machines = forecast.cluster(gpu, nodes, gpus_per_node, price)
    made = forecast.forecast(loaded, machines)
    print(render_plan(made.plan), end="")
    print(render_forecast(made, *forecast.suggest(loaded, machines)), end="")


Run = Annotated[Path, typer.Argument(help="A run folder, such as runs/quickstart.")]


@checkpoint_app.command("list")
def checkpoint_list(run: Run) -> None:
    """List the checkpoints of a run with their sizes and held-out scores.

    Each can be resumed with any number of ranks, at any ZeRO stage, without conversion.

    Example: hourglass checkpoint list runs/try
    """
    from hourglass_dist.checkpoint.tools import listing

    for line in listing(run):
        print(line)


@checkpoint_app.command("verify")
def checkpoint_verify(
    run: Run, step: Annotated[int | None, typer.Option(help="Only that of this step.")] = None
) -> None:
    """Verify every byte of a run's checkpoints; exit code 2 when one is damaged.

    Example: hourglass checkpoint verify runs/try
    """
    from hourglass_dist.checkpoint.tools import check

    for line in check(run, step):
        print(line, flush=True)


@checkpoint_app.command("delete")
def checkpoint_delete(
    run: Run, steps: Annotated[list[int], typer.Argument(help="Of which steps.")]
) -> None:
    """Delete checkpoints of a run; the newest one is never deleted.

    Example: hourglass checkpoint delete runs/try 1000
    """
    from hourglass_dist.checkpoint.tools import delete

    for line in delete(run, steps):
        print(line)


@app.command()
def status(
    run: Run,
    as_json: Annotated[bool, typer.Option("--json", help="All of it, for programs.")] = False,
) -> None:
    """Show the status of a run: step, loss, speed, silent or slow ranks, the last checkpoint, and
    why it last ended. Only files are read, so it works on any machine that can read the run
    folder.

    Exit code: 0 running or finished, 75 stopped on request (start it again), 1 crashed or hanging,
    2 no run there.

    Example: hourglass status runs/try
    """
    from hourglass_dist.report import status as of_run

    found = of_run.read_status(run)
    if as_json:
        print(json.dumps(of_run.as_json(found), indent=1))
    else:
        print(of_run.render(found, sys.stdout.isatty()), end="")
    raise typer.Exit(found.exit_code)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A run folder, such as runs/quickstart.")],
    out: Annotated[
        Path | None, typer.Option(help="The page; RUN/report.html if not given.")
    ] = None,
) -> None:
    """Write a report of a run, finished or not, as one self-contained HTML page: curves, starts,
    samples, plan and settings.

    Example: hourglass report runs/try --out report.html
    """
    from hourglass_dist.report.page import write_report

    target = out or run / "report.html"
    write_report(run, target)
    print(target)


@app.command()
def export(
    run: Run,
    out: Annotated[Path, typer.Argument(help="The new folder.")],
    format: Annotated[
        Literal["hourglass", "lucidrains"],
        typer.Option(help="'lucidrains': for hourglass-transformer-pytorch 0.0.6."),
    ] = "hourglass",
    step: Annotated[
        int | None,
        typer.Option(help="Export this step instead of the newest one."),
    ] = None,
) -> None:
    """Export a checkpoint of a run as model.safetensors, config.json and the tokenizer.

    Example: hourglass export runs/try exports/try
    """
    from hourglass_dist.inference.export import export as write_export

    done = write_export(run, out, format, step)
    print(f"{out}: step {done} of {run}")


@app.command()
def evaluate(
    export: Export,
    data: Annotated[str, typer.Option(help="A dataset (folder or address) with a held-out split.")],
    batch_size: Annotated[int, typer.Option(help="Rows in one forward pass.", min=1)] = 16,
    context: Annotated[
        int | None,
        typer.Option(help="Tokens in a row; without it, as many as in training.", min=1),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(help="Tokens between rows: each has context - stride before it.", min=1),
    ] = None,
) -> None:
    """Score an export on a held-out split, in bits per byte; every byte is scored once.

    Example: hourglass evaluate exports/try --data data/try --stride 32
    """
    from hourglass_dist.inference.score import evaluate_export

    found, context = evaluate_export(export, data, batch_size, context, stride)
    score = found.whole
    windows = f"; {context} tokens every {stride}" if stride else ""
    print(
        f"{export} on {data}: {score.bits_per_byte:.4f} bits/byte, {score.loss:.4f} nats/token "
        f"({score.tokens:,} tokens, {score.bytes:,} bytes{windows})"
    )


@app.command()
def generate(
    export: Export,
    prompt: Annotated[
        str | None,
        typer.Option(help="The text to continue; without it, standard input is read."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate.", min=1)] = 400,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.", min=0)] = 0.8,
    top_k: Annotated[int, typer.Option(help="Keep the k most likely tokens; 0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the most likely tokens up to this sum.")] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
) -> None:
    """Generate the continuation of a text, token by token, on standard output.

    Example: hourglass generate exports/try --prompt "ROMEO:" --max-new-tokens 200
    """
    from hourglass_dist.inference.generate import generate_text

    text = os.fsencode(prompt) if prompt is not None else sys.stdin.buffer.read()
    for piece in generate_text(export, text, max_new_tokens, temperature, top_k, top_p, seed):
        print(piece, end="", flush=True)
    print()


def main() -> None:
    """Run the console command; mistakes of the user end with one line on stderr and exit code 2."""
    try:
        app()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(exit_codes.FAILED)
    except ModuleNotFoundError as error:
        extra = "pip install 'hourglass_dist[prepare]'"
        print_error(ValueError(f"this needs the package {error.name}: {extra}"))
        sys.exit(exit_codes.BAD_INPUT)
    except (ValueError, OSError) as error:
        print_error(error)
        sys.exit(exit_codes.BAD_INPUT)


if __name__ == "__main__":
    main()
