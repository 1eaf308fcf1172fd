"""Commands of ``hourglass data``; the module of a command's name does its work."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

import typer

from data_tools import shard as sharding
from data_tools.datasets import reshape
from data_tools.datasets.inspect import batch_rows, describe, documents, random_documents, row_ids
from data_tools.datasets.reshape import compare
from data_tools.datasets.verify import verify as verify_dataset
from data_tools.datasets.write import SPLITS
from data_tools.live_line import live_line
from data_tools.train_tokenizer import train_tokenizer
from hourglass_dist.config.describe import describe as describe_settings
from hourglass_dist.data.manifest import Manifest, Split
from hourglass_dist.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

app = typer.Typer(
    no_args_is_help=True, help="Prepare a corpus: train a tokenizer, make shards, look at them."
)

Inputs = Annotated[
    list[Path],
    typer.Argument(
        help="Files (.txt, .jsonl, also .gz and .zst) and folders of such files; "
        "tinyshakespeare comes with the package."
    ),
]
Separator = Annotated[
    str | None,
    typer.Option(help=r"What stands between documents in .txt files, such as '\n\n'."),
]
TextField = Annotated[str, typer.Option(help="The field of the text in .jsonl files.")]


StepName = Literal["read", "exact", "bands", "clusters", "tokenizer", "tokens", "shards"]
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

    hourglass data tokenizer tinyshakespeare --vocab-size 2048 --out data/tok
    """
    with live_line() as show:
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

    hourglass data shard tinyshakespeare --held-out last:0.1 --out data/try
    """
    spec = sharding.plan_dataset(
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
    finished = sharding.find_finished(spec, out)
    if finished:
        print(f"already there: {_summary(finished)}")
        return
    with live_line() as show:
        if dry_run:
            _print_counts(sharding.count(spec, show), out)
        else:
            print(_summary(sharding.make_dataset(spec, out, show)))


def _load(tokenizer: str) -> Tokenizer:
    return ByteTokenizer() if tokenizer == "bytes" else load_tokenizer(Path(tokenizer))


def _unescape(separator: str | None) -> str | None:
    return separator and separator.replace("\\n", "\n").replace("\\t", "\t")


def _summary(manifest: Manifest) -> str:
    """Return one line about a dataset."""
    parts = []
    for split in SPLITS:
        shards = [shard for shard in manifest.shards if shard.split == split]
        tokens = sum(shard.tokens for shard in shards)
        text = sum(shard.text_bytes for shard in shards)
        parts.append(f"{split} {tokens:,} tokens ({text:,} bytes) in {len(shards)} shards")
    if manifest.empty_documents:
        parts.append(f"{manifest.empty_documents:,} empty documents left out")
    return f"{manifest.folder}: {', '.join(parts)}, id {manifest.dataset_id[:12]}"


def _print_counts(read: sharding.ReadCounts, out: Path) -> None:
    for split, counts in read.splits.items():
        print(
            f"{split}: {counts.documents:,} documents, {counts.text_bytes:,} bytes, "
            f"{counts.tokens:,} tokens"
        )
    if read.empty_documents:
        print(f"left out: {read.empty_documents:,} empty documents")
    print(f"{out}: nothing written (--dry-run)")


@app.command()
def prepare(
    config: Annotated[
        str | None,
        typer.Argument(
            help="A YAML file, or the name of shipped settings, bytes or english; a key for "
            "--describe."
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Settings to change, such as out=data/mine executor.workers=4."),
    ] = None,
    step: Annotated[
        StepName | None,
        typer.Option("--step", "--stage", help="Do this step only; those before it must be done."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option(help="Say what would be read and made, and how long it might take.")
    ] = False,
    describe: Annotated[
        bool, typer.Option("--describe", help="Say what a setting, or every setting, means.")
    ] = False,
) -> None:
    """Make shuffled datasets of a corpus of any size, cleaned and without duplicates.

    Runs on the cores of this machine, a Ray cluster or Slurm, and continues where it was stopped.

    Example: hourglass data prepare bytes out=data/bytes

    Example: hourglass data prepare --describe filters
    """
    from data_tools.pipeline.settings import Prepare, load_settings

    if describe:
        print(describe_settings(Prepare, config or ""), end="")
        return
    if config is None:
        raise ValueError("expected CONFIG, such as bytes, or --describe [KEY]")
    settings = load_settings(config, overrides or ())
    from data_tools.pipeline import prepare as preparing

    if dry_run:
        print("\n".join(preparing.dry_run(settings)))
        return
    with live_line() as show:
        report = preparing.prepare(settings, only=step, show=show, say=print)
    if report:
        print("\n".join([*report.lines(), f"report    {settings.out}/report.html"]))


@app.command()
def inspect(
    dataset: Dataset,
    show: Annotated[int, typer.Option(help="Print this many documents, too.", min=0)] = 0,
    random: Annotated[bool, typer.Option(help="Documents drawn at random, not the first.")] = False,
    seed: Annotated[int, typer.Option(help="Of the draw; of the run, for --step.", min=0)] = 0,
    step: Annotated[
        int | None,
        typer.Option(help="Say which rows each rank of a run reads at this step.", min=0),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows in a step, for --step.", min=1)] = 8,
    ranks: Annotated[int, typer.Option(help="Ranks of the run, for --step.", min=1)] = 1,
    row: Annotated[
        int | None, typer.Option(help="Print this row of the split: its targets as text.")
    ] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens in a row.", min=1)] = 1024,
    split: Annotated[Split, typer.Option(help="Whose documents and rows.")] = "train",
    characters: Annotated[int, typer.Option(help="Of each document, at most.", min=1)] = 400,
) -> None:
    """Print the facts of a dataset, and documents and rows of it on request.

    Example: hourglass data inspect data/try --show 1
    """
    manifest, tokenizer = Manifest.load(dataset), load_tokenizer(dataset)
    print(describe(manifest, tokenizer))
    if row is not None:
        shard_name, inside, ids = row_ids(manifest, split, seq_len, row)
        print(f"\n--- {split} row {row:,}: row {inside:,} of {shard_name}, {len(ids):,} tokens")
        print(tokenizer.decode(ids.tolist()))
    if step is not None:
        print()
        for line in batch_rows(dataset, step, batch_size, seq_len, ranks, seed):
            print(line)
    numbered = enumerate(islice(documents(manifest, split, tokenizer), show), 1)
    drawn = random_documents(manifest, split, tokenizer, show, seed)
    for number, text in drawn if random else numbered:
        more = f" ({len(text):,} characters)" if len(text) > characters else ""
        print(f"\n--- {split} document {number}{more}\n{text[:characters]}")


@app.command()
def stats(
    dataset: Dataset,
    out: Annotated[Path, typer.Option(help="The folder of the plots.")],
    split: Annotated[Split, typer.Option(help="Whose documents.")] = "train",
) -> None:
    """Count and plot a dataset: lengths of documents, bytes per token, how often ids occur.

    Example: hourglass data stats data/try --out plots/try
    """
    from data_tools.datasets.stats import stats as make_stats

    with live_line() as show:
        lines = make_stats(dataset, split, out, show)
    print("\n".join(lines))


@app.command()
def diff(
    a: Annotated[Path, typer.Argument(help="A dataset folder.")],
    b: Annotated[Path, typer.Argument(help="Another one.")],
) -> None:
    """Print how two datasets differ: recipe, tokenizer, documents. Exit code 1 if they do.

    Example: hourglass data diff data/try data/try
    """
    lines = compare(a, b)
    print("\n".join(lines) if lines else f"{a} and {b} are the same")
    if lines:
        raise typer.Exit(1)


@app.command()
def merge(
    datasets: Annotated[list[Path], typer.Argument(help="Dataset folders with one tokenizer.")],
    out: Annotated[Path, typer.Option(help="The new dataset folder.")],
    seed: Annotated[int, typer.Option(help="Of the shuffle of documents.", min=0)] = 0,
) -> None:
    """Merge several datasets into one, all documents shuffled together. Nothing is encoded again.

    Example: hourglass data merge data/try data/small --out data/merged
    """
    with live_line() as show:
        print(_summary(reshape.merge(datasets, out, seed, show)))


@app.command(name="split")
def split_command(
    dataset: Dataset,
    first: Annotated[Path, typer.Option(help="The new dataset with the fraction.")],
    second: Annotated[Path, typer.Option(help="The new dataset with the rest.")],
    fraction: Annotated[float, typer.Option(help="Of the documents, by content.")] = 0.1,
) -> None:
    """Split a dataset into two by the content of its documents. Nothing is encoded again.

    Example:

    hourglass data split data/bytes/plays --first data/part --second data/rest
    """
    with live_line() as show:
        for manifest in reshape.split(dataset, first, second, fraction, show):
            print(_summary(manifest))


@app.command()
def reshard(
    dataset: Dataset,
    out: Annotated[Path, typer.Option(help="The new dataset folder.")],
    block_tokens: Annotated[int, typer.Option(help="Tokens in a block.", min=1)] = 2**19,
    shard_blocks: Annotated[int, typer.Option(help="Blocks in a shard, at most.", min=1)] = 64,
) -> None:
    """Change the sizes of blocks and shards. Documents keep their order; nothing is encoded again.

    Example: hourglass data reshard data/try --block-tokens 4096 --out data/small
    """
    with live_line() as show:
        print(_summary(reshape.reshard(dataset, out, block_tokens, shard_blocks, show)))


@app.command()
def export_text(
    dataset: Dataset,
    out: Annotated[Path, typer.Option(help="The new file, .jsonl or .jsonl.zst.")],
    split: Annotated[Split, typer.Option(help="Whose documents.")] = "train",
) -> None:
    """Write the documents of a dataset as JSON lines, unchanged.

    Example: hourglass data export-text data/try --out try.jsonl
    """
    with live_line() as show:
        count = reshape.export_text(dataset, out, split, show)
    print(f"{out}: {count:,} documents")


@app.command()
def verify(dataset: Dataset) -> None:
    """Check manifest, tokenizer, every file's hash and every block of a dataset.

    Example: hourglass data verify data/try
    """
    with live_line() as show:
        manifest = verify_dataset(dataset, show)
    print(f"whole: {_summary(manifest)}")


def bench_prepare(
    inputs: Inputs,
    kinds: Annotated[str, typer.Option(help="Tokenizers, with commas.")] = "bytes,unigram,bpe",
    megabytes: Annotated[int, typer.Option(help="Text in a round.", min=1)] = 20,
    rounds: Annotated[int, typer.Option(help="Rounds that count.", min=1)] = 3,
) -> None:
    """Measure how fast one core prepares text, compared with sentencepiece's own encoding alone.

    Example: hourglass bench prepare tinyshakespeare --megabytes 10
    """
    wanted = kinds.split(",")
    for kind in wanted:
        if kind not in ("bytes", "unigram", "bpe"):
            raise ValueError(f"--kinds: expected some of bytes,unigram,bpe, given {kind!r}")
    from data_tools.bench import bench_prepare as measure

    with live_line() as show:
        lines = measure(inputs, wanted, megabytes, rounds, show)
    print("\n".join(lines))
