"""``hourglass data ...``: thin. What a command does lives in the module of its name."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import Progress as Bar
from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

from data_tools import shard as sharding
from data_tools.inspect import describe, documents
from data_tools.tokenizer import train_tokenizer
from data_tools.verify import verify as verify_dataset
from data_tools.workspace import Show
from hourglass_dist.data.shards import Manifest, Split
from hourglass_dist.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

LOG_EVERY_S = 30.0

app = typer.Typer(
    no_args_is_help=True, help="Prepare a corpus: train a tokenizer, make shards, look at them."
)

Inputs = Annotated[
    list[Path],
    typer.Argument(help="Files (.txt, .jsonl, also .gz and .zst) and folders of such files."),
]
Separator = Annotated[
    str | None,
    typer.Option(help=r"What stands between documents in .txt files, such as '\n\n'."),
]
TextField = Annotated[str, typer.Option(help="The field of the text in .jsonl files.")]


StageName = Literal["read", "exact", "bands", "clusters", "tokenizer", "tokens", "shards"]
Dataset = Annotated[Path, typer.Argument(help="A folder made by 'hourglass data shard'.")]


@app.command()
def tokenizer(
    inputs: Inputs,
    out: Annotated[Path, typer.Option(help="The new folder.")],
    kind: Annotated[
        Literal["unigram", "bpe"],
        typer.Option(help="unigram encodes about four times as fast as bpe."),
    ] = "unigram",
    vocab_size: Annotated[int, typer.Option(help="Pieces, 258 specials included.")] = 8192,
    separator: Separator = None,
    text_field: TextField = "text",
    max_lines: Annotated[
        int, typer.Option(help="Lines to train on, drawn at random.", min=1)
    ] = 1_000_000,
    seed: Annotated[int, typer.Option(help="Of the draw.", min=0)] = 0,
) -> None:
    """Train a lossless sentencepiece tokenizer. (Bytes, the default of 'shard', need none.)

    Example:

    hourglass data tokenizer data_tools/corpora --vocab-size 2048 --out data/tok
    """
    with _live_line() as show:
        trained = train_tokenizer(
            inputs,
            out,
            kind=kind,
            vocab_size=vocab_size,
            separator=_unescape(separator),
            text_field=text_field,
            max_lines=max_lines,
            seed=seed,
            show=show,
        )
    model = trained.fingerprint.model_sha256
    print(f"{out}: {kind}, {trained.vocab_size:,} ids, model sha256 {model}")


@app.command()
def shard(
    inputs: Inputs,
    out: Annotated[Path, typer.Option(help="The new dataset folder.")],
    tokenizer: Annotated[
        str, typer.Option(help="'bytes', or a folder made by 'hourglass data tokenizer'.")
    ] = "bytes",
    held_out: Annotated[
        str,
        typer.Option(
            help="Text kept out of training: hash:0.01 (documents), last:0.1 (the end of each), "
            "input:PATH or none."
        ),
    ] = "hash:0.01",
    separator: Separator = None,
    text_field: TextField = "text",
    seed: Annotated[int, typer.Option(help="Of the shuffle of documents.", min=0)] = 0,
    block_tokens: Annotated[
        int, typer.Option(help="Tokens in a block; sequence lengths must divide it.", min=1)
    ] = 2**19,
    shard_blocks: Annotated[int, typer.Option(help="Blocks in a shard, at most.", min=1)] = 64,
    source: Annotated[
        str | None,
        typer.Option(help="A name for the source (default: the first file's)."),
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Read and count; write nothing.")] = False,
) -> None:
    """Turn a corpus into a dataset: encoded, shuffled, packed into WebDataset shards.

    Example:

    hourglass data shard data_tools/corpora --held-out last:0.1 --out data/try
    """
    job = sharding.plan_job(
        inputs,
        _load(tokenizer),
        held_out=held_out,
        separator=_unescape(separator),
        text_field=text_field,
        seed=seed,
        block_tokens=block_tokens,
        shard_blocks=shard_blocks,
        source=source,
    )
    finished = sharding.find_finished(job, out)
    if finished:
        print(f"already there: {_summary(finished)}")
        return
    with _live_line() as show:
        if dry_run:
            _print_counts(sharding.count(job, show), out)
        else:
            print(_summary(sharding.make_dataset(job, out, show)))


def _load(tokenizer: str) -> Tokenizer:
    return ByteTokenizer() if tokenizer == "bytes" else load_tokenizer(Path(tokenizer))


def _unescape(separator: str | None) -> str | None:
    return separator and separator.replace("\\n", "\n").replace("\\t", "\t")


def _summary(manifest: Manifest) -> str:
    """One line about a dataset."""
    parts = []
    for split in sharding.SPLITS:
        shards = [shard for shard in manifest.shards if shard.split == split]
        tokens = sum(shard.tokens for shard in shards)
        text = sum(shard.text_bytes for shard in shards)
        parts.append(f"{split} {tokens:,} tokens ({text:,} bytes) in {len(shards)} shards")
    if manifest.empty_documents:
        parts.append(f"{manifest.empty_documents:,} empty documents left out")
    return f"{manifest.folder}: {', '.join(parts)}, id {manifest.dataset_id[:12]}"


def _print_counts(progress: sharding.Progress, out: Path) -> None:
    for split, counts in progress.splits.items():
        print(
            f"{split}: {counts.documents:,} documents, {counts.text_bytes:,} bytes, "
            f"{counts.tokens:,} tokens"
        )
    if progress.empty_documents:
        print(f"left out: {progress.empty_documents:,} empty documents")
    print(f"{out}: nothing written (--dry-run)")


@app.command()
def prepare(
    config: Annotated[
        Path, typer.Argument(help="A YAML file such as configs/prepare/english.yaml.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Settings to change, such as out=data/mine executor.workers=4."),
    ] = None,
    stage: Annotated[
        StageName | None,
        typer.Option(help="Do this stage only; those before it must be done."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option(help="Say what would be read and made, and how long it might take.")
    ] = False,
) -> None:
    """Make datasets of a corpus of any size: clean, without duplicates, shuffled.

    Runs on the cores of this machine, a Ray cluster or Slurm, and goes on where it was stopped.

    Example: hourglass data prepare configs/prepare/bytes.yaml out=data/bytes
    """
    from data_tools.settings import load_settings

    settings = load_settings(config, overrides or ())
    preparing = _prepare_module()
    if dry_run:
        print("\n".join(preparing.plan(settings)))
        return
    with _live_line() as show:
        report = preparing.prepare(settings, only=stage, show=show, say=print)
    if report:
        print("\n".join([*report.lines(), f"report    {settings.out}/report.html"]))


def _prepare_module() -> Any:
    """The pipeline, whose packages training does not need."""
    try:
        from data_tools import prepare as preparing
    except ModuleNotFoundError as error:
        raise ValueError(
            f"'hourglass data prepare' needs the package {error.name}: "
            "pip install 'hourglass_dist[prepare]'"
        ) from None
    return preparing


@app.command()
def inspect(
    dataset: Dataset,
    show: Annotated[int, typer.Option(help="Print this many documents, too.", min=0)] = 0,
    split: Annotated[Split, typer.Option(help="Whose documents.")] = "train",
    characters: Annotated[int, typer.Option(help="Of each document, at most.", min=1)] = 400,
) -> None:
    """Say what is in a dataset.

    Example: hourglass data inspect data/try --show 1
    """
    manifest, tokenizer = Manifest.load(dataset), load_tokenizer(dataset)
    print(describe(manifest, tokenizer))
    for number, text in enumerate(islice(documents(manifest, split, tokenizer), show), 1):
        more = f" ({len(text):,} characters)" if len(text) > characters else ""
        print(f"\n--- {split} document {number}{more}\n{text[:characters]}")


@app.command()
def verify(dataset: Dataset) -> None:
    """Check manifest, tokenizer, every file's hash and every block of a dataset.

    Example: hourglass data verify data/try
    """
    with _live_line() as show:
        manifest = verify_dataset(dataset, show)
    print(f"whole: {_summary(manifest)}")


@contextmanager
def _live_line() -> Iterator[Show]:
    """A function that shows a line on stderr: over the one before on a terminal, else now and then
    one for the log."""
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    console = Console(stderr=True)
    shown = time.monotonic()

    def log(line: str) -> None:
        nonlocal shown
        if time.monotonic() - shown > LOG_EVERY_S:
            shown = time.monotonic()
            print(line, file=sys.stderr, flush=True)

    if not console.is_terminal:
        yield log
        return
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("")
        yield lambda line: bar.update(task, description=line)
