"""``hourglass data ...``: thin. What a command does lives in the module of its name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console
from rich.progress import Progress as Bar
from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

from data_tools import shard as sharding
from hourglass_dist.data.shards import Manifest
from hourglass_dist.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

app = typer.Typer(no_args_is_help=True, help="Prepare a corpus: tokenizer, shards; look at them.")

Inputs = Annotated[
    list[Path],
    typer.Argument(help="Files (.txt, .jsonl, also .gz and .zst) and folders of such files."),
]
Separator = Annotated[
    Optional[str],  # noqa: UP045  (typer reads annotations at run time, on Python 3.10 too)
    typer.Option(help=r"What stands between documents in .txt files, such as '\n\n'."),
]
TextField = Annotated[str, typer.Option(help="The field of the text in .jsonl files.")]


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
        Optional[str],  # noqa: UP045
        typer.Option(help="A name for the source (default: the first file's)."),
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Read and count; write nothing.")] = False,
) -> None:
    """Turn a corpus into a dataset: encoded, shuffled, packed into WebDataset shards.

    Example: hourglass data shard data_tools/corpora --held-out last:0.1 --out data/tinyshakespeare
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
    with _progress_line() as report:
        if dry_run:
            _print_counts(sharding.count(job, report), out)
        else:
            print(_summary(sharding.make_dataset(job, out, report)))


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
    return f"{manifest.folder}: {', '.join(parts)}, id {manifest.dataset_id[:12]}"


def _print_counts(progress: sharding.Progress, out: Path) -> None:
    for split, counts in progress.splits.items():
        print(
            f"{split}: {counts.documents:,} documents, {counts.text_bytes:,} bytes, "
            f"{counts.tokens:,} tokens"
        )
    print(f"{out}: nothing written (--dry-run)")


@contextmanager
def _progress_line() -> Iterator[sharding.Report]:
    """A live line on stderr, when that is a terminal."""
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading")

        def report(progress: sharding.Progress) -> None:
            if progress.documents % 100 == 0:
                bar.update(
                    task,
                    description=f"{progress.files} files, {progress.documents:,} documents, "
                    f"{progress.text_bytes / 1e6:,.1f} MB",
                )

        yield report
