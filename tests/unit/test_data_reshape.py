"""Looking at datasets and making others of them: documents stay what they were."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from datasets import NASTY, make, refusal, stream_of, words
from paths import CORPORA
from ranks import hourglass

from data_tools.datasets.inspect import batch_rows, documents, random_documents, row_ids
from data_tools.datasets.reshape import compare, export_text, merge, reshard, split
from data_tools.datasets.stats import stats
from data_tools.datasets.verify import verify
from data_tools.shard import make_dataset, plan_dataset
from data_tools.train_tokenizer import train_tokenizer
from hourglass_dist.data.manifest import Manifest, Split
from hourglass_dist.data.shards import ShardReader
from hourglass_dist.data.tokenizer import ByteTokenizer, load_tokenizer

SPLITS: tuple[Split, ...] = ("train", "heldout")


def texts_of(folder: Path, part: Split) -> list[str]:
    return list(documents(Manifest.load(folder), part, load_tokenizer(folder)))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Short and nasty documents, and one that spans several shards."""
    folder = tmp_path_factory.mktemp("dataset")
    return make(folder, [*words(120), *NASTY[1:], "long " * 300]).folder


def test_reshard_keeps_the_order(dataset: Path, tmp_path: Path) -> None:
    reshard(dataset, tmp_path / "new", block_tokens=128, shard_blocks=2)
    verify(tmp_path / "new")
    for part in SPLITS:
        assert texts_of(tmp_path / "new", part) == texts_of(dataset, part)
    reshard(tmp_path / "new", tmp_path / "back", block_tokens=64, shard_blocks=3)
    assert compare(tmp_path / "back", dataset) == []


def test_merge_has_all_documents_shuffled(dataset: Path, tmp_path: Path) -> None:
    other = make(tmp_path, words(90, seed=1)).folder
    merge([dataset, other], tmp_path / "merged", seed=3)
    verify(tmp_path / "merged")
    for part in SPLITS:
        both = texts_of(dataset, part) + texts_of(other, part)
        found = texts_of(tmp_path / "merged", part)
        assert sorted(found) == sorted(both)
        assert found != both
    lines = compare(dataset, tmp_path / "merged")
    common = len(set(texts_of(dataset, "train")))
    assert any(f"{common} in both, 0 only in {dataset}" in line for line in lines)


def test_merge_refuses_another_tokenizer(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(words(80)))
    tokenizer = train_tokenizer([tmp_path / "a.txt"], tmp_path / "t", kind="bpe", vocab_size=300)
    other = make(tmp_path, words(60), tokenizer).folder
    message = refusal(lambda: merge([dataset, other], tmp_path / "merged"))
    assert message.startswith(f"tokenizers differ: {dataset} has vocabulary")
    assert not (tmp_path / "merged").exists()


def test_split_parts_documents_by_content(dataset: Path, tmp_path: Path) -> None:
    split(dataset, tmp_path / "a", tmp_path / "b", 0.3)
    for part in SPLITS:
        a, b = (texts_of(tmp_path / name, part) for name in ("a", "b"))
        assert sorted(a + b) == sorted(texts_of(dataset, part))
        assert not set(a) & set(b)
        assert len(a) < len(b)
    assert "--fraction: expected" in refusal(
        lambda: split(dataset, tmp_path / "c", tmp_path / "d", 1.0)
    )


@pytest.mark.parametrize(("fraction", "empty"), [(1e-6, "c"), (1 - 1e-6, "d")])
def test_split_refuses_an_empty_part(
    dataset: Path, tmp_path: Path, fraction: float, empty: str
) -> None:
    message = refusal(lambda: split(dataset, tmp_path / "c", tmp_path / "d", fraction))
    assert message.startswith(f"{tmp_path / empty}: would have none of the training documents")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["all.jsonl", "all.jsonl.zst"])
def test_exported_text_makes_the_same_documents(dataset: Path, tmp_path: Path, name: str) -> None:
    count = export_text(dataset, tmp_path / name, "train")
    assert count == len(texts_of(dataset, "train"))
    job = plan_dataset([tmp_path / name], ByteTokenizer(), held_out="none", block_tokens=64)
    make_dataset(job, tmp_path / "again")
    assert sorted(texts_of(tmp_path / "again", "train")) == sorted(texts_of(dataset, "train"))
    assert "already exists" in refusal(lambda: export_text(dataset, tmp_path / name, "train"))


def test_random_documents_are_documents(dataset: Path) -> None:
    manifest, tokenizer = Manifest.load(dataset), load_tokenizer(dataset)
    expected = texts_of(dataset, "train")
    assert list(random_documents(manifest, "train", tokenizer, 10**6, 0)) == list(
        enumerate(expected)
    )
    some = list(random_documents(manifest, "train", tokenizer, 7, 5))
    assert len(some) == 7
    assert all(expected[number] == text for number, text in some)


def test_rows_are_cuts_of_the_split(dataset: Path) -> None:
    manifest = Manifest.load(dataset)
    flat = b"".join(text.encode() + b"\xff" for text in texts_of(dataset, "train"))
    rows = sum(manifest.rows("train", 16))
    found = [row_ids(manifest, "train", 16, row)[2].tobytes() for row in range(rows)]
    assert b"".join(found) == flat
    assert "--row: expected 0 to" in refusal(lambda: row_ids(manifest, "train", 16, rows))


def test_the_rows_of_a_step_are_those_that_the_ranks_read(dataset: Path) -> None:
    manifest = Manifest.load(dataset)
    lines = list(batch_rows(dataset, step=3, batch_size=12, seq_len=16, ranks=3, seed=5))
    reader = ShardReader(manifest, "train", 16)
    names = [shard.path for shard in manifest.split("train")]
    for rank in range(3):
        read = next(stream_of(manifest, 16, 12, 5, rank, 3).read(3))
        said = set()
        for line in lines:
            if found := re.fullmatch(rf"rank {rank}: epoch 0, (\S+): rows ([0-9, ]+)", line):
                for row in found[2].split(", "):
                    said.add(reader.row(names.index(found[1]), int(row))[1].tobytes())
        assert said == {row.numpy().tobytes() for row in read.targets_BL}
    reader.close()


def test_stats_count_documents_across_blocks(dataset: Path, tmp_path: Path) -> None:
    stats(dataset, "train", tmp_path / "plots")
    lengths = [len(text.encode()) + 1 for text in texts_of(dataset, "train")]
    found = json.loads((tmp_path / "plots" / "stats.json").read_text())
    assert found["documents"] == len(lengths)
    assert found["tokens"] == sum(lengths)
    assert found["bytes"] == sum(lengths) - len(lengths)
    assert found["median_tokens"] == int(np.median(lengths))
    assert found["longest_tokens"] == max(lengths)
    for path in (tmp_path / "plots").glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_benchmark_measures_all_kinds() -> None:
    corpus = CORPORA
    done = hourglass("bench", "prepare", corpus, "--megabytes", 1, "--rounds", 1)
    assert done.returncode == 0, done.stderr
    head, columns, *kinds = done.stdout.splitlines()
    assert head.startswith("333 documents, 1.0 MB, 1 rounds, one core")
    assert columns.split() == ["tokenizer", "raw", "prepare", "ratio", "steps"]
    assert [line.split()[0] for line in kinds] == ["bytes", "unigram", "bpe"]
    wrong = hourglass("bench", "prepare", corpus, "--kinds", "words")
    assert wrong.stderr == "error: --kinds: expected some of bytes,unigram,bpe, given 'words'\n"
