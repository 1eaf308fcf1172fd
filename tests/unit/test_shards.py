"""The dataset folder: other tools read it, rows are views of it, and no damage goes unnoticed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import webdataset
from datasets import local, make, plain_webdataset, refusal, stream_of, words
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.datasets.inspect import documents
from data_tools.datasets.sorted_runs import Run, gather, plan_runs, write_run
from data_tools.train_tokenizer import train_tokenizer
from hourglass_dist.data.held_out import held_out_rows
from hourglass_dist.data.manifest import Manifest, Split, dtype_name
from hourglass_dist.data.shards import IGNORED, ShardReader
from hourglass_dist.data.tokenizer import ByteTokenizer, load_tokenizer
from hourglass_dist.data.write import cut_blocks

TEXTS = words(60)
SPLITS: tuple[Split, ...] = ("train", "heldout")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make(tmp_path_factory.mktemp("shards"), TEXTS)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """The same text in sentencepiece ids, two bytes each."""
    folder = tmp_path_factory.mktemp("wide")
    (folder / "text.txt").write_text("\n".join(TEXTS))
    tokenizer = train_tokenizer([folder / "text.txt"], folder / "bpe", kind="bpe", vocab_size=300)
    return make(folder, TEXTS, tokenizer)


# --- other tools ---------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["manifest", "wide"])
def test_plain_webdataset_reads_every_shard(which: str, request: pytest.FixtureRequest) -> None:
    manifest: Manifest = request.getfixturevalue(which)
    for shard in manifest.shards:
        path = str(manifest.folder / shard.path)
        samples = list(webdataset.WebDataset(path, shardshuffle=False))
        assert len(samples) == shard.blocks
        for sample in samples:
            about = json.loads(sample["json"])
            assert about["source"] == "corpus"
            for name, expected in about["crc32c"].items():
                assert f"{google_crc32c.value(sample[name]):08x}" == expected
        assert sum(json.loads(s["json"])["tokens"] for s in samples) == shard.tokens
        assert sum(len(s["ends.u32"]) // 4 for s in samples) == shard.documents


def test_tar_lists_every_shard(manifest: Manifest) -> None:
    for shard in manifest.shards:
        path = manifest.folder / shard.path
        done = subprocess.run(["tar", "tf", path], capture_output=True, text=True, check=True)
        stem = shard.path.removesuffix(".tar")
        assert done.stderr == ""
        assert done.stdout.split() == [
            f"{stem}-{block:06d}.{name}"
            for block in range(shard.blocks)
            for name in ("ends.u32", "json", "tokens.u8")
        ]
        assert path.read_bytes()[257:263] == b"ustar\0"  # POSIX USTAR, no extensions


def test_offsets_are_where_the_ids_are(manifest: Manifest) -> None:
    for split in SPLITS:
        ids = iter(plain_webdataset(manifest, split))
        for shard in manifest.split(split):
            data = (manifest.folder / shard.path).read_bytes()
            for offset in shard.offsets:
                block = np.frombuffer(data, np.uint8, manifest.block_tokens, offset)
                assert np.array_equal(block, next(ids)[0])


# --- content -------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["manifest", "wide"])
def test_every_document_is_there_once_and_shuffled(
    which: str, request: pytest.FixtureRequest
) -> None:
    manifest: Manifest = request.getfixturevalue(which)
    tokenizer = load_tokenizer(manifest.folder)
    train, held_out = (list(documents(manifest, split, tokenizer)) for split in SPLITS)
    assert sorted(train + held_out) == sorted(TEXTS)
    assert train != sorted(train, key=TEXTS.index)
    assert 5 < len(held_out) < 35  # about 0.3 of 60
    for split, texts in zip(SPLITS, (train, held_out), strict=True):
        shards = manifest.split(split)
        assert sum(s.text_bytes for s in shards) == sum(len(t.encode()) for t in texts)


def test_only_the_last_block_of_a_split_is_padded(manifest: Manifest) -> None:
    for split in SPLITS:
        *full, (last, about) = plain_webdataset(manifest, split)
        assert {block["tokens"] for _, block in full} == {manifest.block_tokens}
        assert 0 < about["tokens"] < manifest.block_tokens
        assert set(last[about["tokens"] :]) == {manifest.eos_id}


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=20),
    block=st.integers(1, 16),
    shard=st.integers(1, 3),
    runs=st.integers(1, 4),
    few_keys=st.booleans(),
)
def test_shards_are_cuts_of_the_sorted_documents(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    block: int,
    shard: int,
    runs: int,
    few_keys: bool,
) -> None:
    """However documents are divided among runs; each shard made on its own, the last one first."""
    folder = tmp_path_factory.mktemp("runs")
    tokenizer = ByteTokenizer()
    random = np.random.default_rng(len(lengths) + block)
    keys = random.integers(0, 3 if few_keys else 2**64, len(lengths), dtype=np.uint64)
    texts = [np.full(length, i, np.uint8) for i, length in enumerate(lengths)]
    made = []
    for i, part in enumerate(np.array_split(np.arange(len(texts)), runs)):
        if len(part):
            made.append(Run(folder / str(i)))
            write_run(made[-1].base, keys[part], [texts[j] for j in part], keys[part], tokenizer)
    plan = plan_runs(made)
    order = np.argsort(keys, kind="stable")
    flat = [token for i in order for token in [*texts[i].tolist(), 255]]
    ends = [i + 1 for i, token in enumerate(flat) if token == 255]
    size = block * shard
    assert plan.shards(size) == -(-len(flat) // size)
    for number in reversed(range(plan.shards(size))):
        begin, end = number * size, min(number * size + size, len(flat))
        found = gather(made, plan, begin, end, tokenizer)
        assert found.tokens.tolist() == flat[begin:end]
        blocks = cut_blocks(found.tokens, found.ends, found.first_document, block, 255)
        for at, b in zip(range(begin, end, block), blocks, strict=True):
            assert b.tokens_T[: b.tokens].tolist() == flat[at : min(at + block, end)]
            assert len(b.tokens_T) == block
            assert b.ends.tolist() == [e - at for e in ends if at < e <= at + block]
            assert b.first_document == sum(e <= at for e in ends)


@pytest.mark.parametrize("bad", [300, 70_000, 0])
def test_ids_that_are_no_documents(tmp_path: Path, bad: int) -> None:
    """Above the vocabulary (and the type of the shard), or the end-of-text id inside a text."""
    (tmp_path / "text.txt").write_text("\n".join(TEXTS))
    inputs = [tmp_path / "text.txt"]
    tokenizer = train_tokenizer(inputs, tmp_path / "bpe", kind="bpe", vocab_size=300)
    ids = np.array([5, 6, bad or tokenizer.eos_id, 7], np.uint32)
    zero = np.zeros(1, np.uint64)
    message = refusal(lambda: write_run(tmp_path / "run", zero, [ids], zero, tokenizer))
    assert message.startswith(f"token 2: id {ids[2]}: ")
    assert not list(tmp_path.glob("run*"))


def test_the_smallest_type_that_fits() -> None:
    assert [dtype_name(n) for n in (256, 257, 65536, 65537)] == ["u8", "u16", "u16", "u32"]


@pytest.mark.parametrize("which", ["manifest", "wide"])
@pytest.mark.parametrize("seq_len", [1, 2, 4, 8, 16, 32, 64])
def test_rows_are_views_of_the_blocks(
    which: str, seq_len: int, request: pytest.FixtureRequest
) -> None:
    """All rows of all shards, end to end, are the real tokens of the split once and in order."""
    manifest: Manifest = request.getfixturevalue(which)
    for split in SPLITS:
        files = len(os.listdir("/proc/self/fd"))
        reader = ShardReader(manifest, split, seq_len, max_open=1)
        rows = [
            reader.row(shard, row)
            for shard, count in enumerate(reader.rows_per_shard)
            for row in range(count)
        ]
        assert len(os.listdir("/proc/self/fd")) <= files + 1
        reader.close()
        assert len(os.listdir("/proc/self/fd")) == files
        blocks = list(plain_webdataset(manifest, split))
        real = np.concatenate([ids[: about["tokens"]] for ids, about in blocks])
        targets = np.concatenate([targets for _, targets in rows])
        assert np.array_equal(targets[: len(real)], real)
        assert set(targets[len(real) :]) <= {IGNORED}
        assert len(targets) - len(real) < seq_len  # no row is only padding
        before = np.concatenate([[manifest.eos_id, *ids[:-1]] for ids, _ in blocks])
        inputs = np.concatenate([inputs for inputs, _ in rows])
        assert np.array_equal(inputs, before[: len(inputs)])


def test_lengths_that_do_not_divide_a_block(manifest: Manifest) -> None:
    message = refusal(lambda: manifest.rows("train", 48))
    assert message.endswith("near lengths that do: 8, 16, 32, 64")
    assert "48" in message
    assert "64" in refusal(lambda: manifest.rows("train", 128))
    assert "0 does not divide" in refusal(lambda: manifest.rows("train", 0))


def test_the_same_inputs_make_the_same_files(manifest: Manifest, tmp_path: Path) -> None:
    again = make(tmp_path, TEXTS)
    assert again.dataset_id == manifest.dataset_id
    for shard in manifest.shards:
        data = (again.folder / shard.path).read_bytes()
        assert hashlib.sha256(data).hexdigest() == shard.sha256
    (tmp_path / "other").mkdir()
    assert make(tmp_path / "other", TEXTS, seed=1).dataset_id != manifest.dataset_id


# --- damage --------------------------------------------------------------------------------------


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _edit(change: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        index = json.loads((folder / "index.json").read_text())
        change(index)
        (folder / "index.json").write_text(json.dumps(index))

    return edit


def _empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def _replace_by_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "expected a dataset folder, found none"),
    "a file": (_replace_by_file, "expected a dataset folder, found a file"),
    "empty": (_empty, "no dataset here: expected index.json"),
    "no index": (lambda d: (d / "index.json").unlink(), "no dataset here: expected index.json"),
    "half an index": (lambda d: (d / "index.json").write_text("{"), "index.json: damaged"),
    "a list": (lambda d: (d / "index.json").write_text("[]"), "index.json: damaged"),
    "newer": (
        _edit(lambda index: index.update(format=4, new_field=1)),
        "written by a newer version: format 4, this one reads 2 to 3",
    ),
    "older": (
        _edit(lambda index: index.update(format=1)),
        "written by an older version: format 1, this one reads 2 to 3",
    ),
    "edited": (_edit(lambda index: index.update(eos_id=7)), "index.json: edited or damaged"),
    "missing key": (_edit(lambda index: index.pop("eos_id")), "eos_id: missing"),
    "unknown key": (_edit(lambda index: index.update(a=1)), "a: unknown key"),
    "missing shard": (
        lambda d: (d / "train-000001.tar").unlink(),
        "train-000001.tar: missing shard: expected 10240 bytes",
    ),
    "truncated shard": (
        lambda d: (d / "train-000001.tar").write_bytes(b"x" * 9000),
        "train-000001.tar: truncated shard: expected 10240 bytes, found 9000",
    ),
    "longer shard": (
        lambda d: (d / "train-000001.tar").write_bytes(b"x" * 10241),
        "train-000001.tar: altered shard: expected 10240 bytes, found 10241",
    ),
    "altered shard": (
        lambda d: _flip(d / "train-000001.tar"),
        "train-000001.tar: altered shard: expected sha256",
    ),
    "extra shard": (
        lambda d: shutil.copy(d / "train-000001.tar", d / "train-000009.tar"),
        "train-000009.tar: extra shard",
    ),
    "swapped shards": (
        lambda d: shutil.copy(d / "train-000001.tar", d / "train-000000.tar"),
        "train-000000.tar: altered shard: expected sha256",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_one_clear_line(manifest: Manifest, tmp_path: Path, what: str) -> None:
    damage, expected = DAMAGE[what]
    folder = tmp_path / "mine"
    shutil.copytree(manifest.folder, folder)
    stream_of(Manifest.load(folder), 8, 4, 0)  # nothing is wrong yet
    damage(folder)
    message = refusal(lambda: stream_of(Manifest.load(folder), 8, 4, 0))
    assert expected in message
    assert str(folder) in message


def test_every_rank_hashes_its_share(manifest: Manifest, tmp_path: Path) -> None:
    shutil.copytree(manifest.folder, tmp_path / "mine")
    _flip(tmp_path / "mine" / "train-000001.tar")
    mine = Manifest.load(tmp_path / "mine")
    stream_of(mine, 8, 4, 0, rank=0, world_size=2)
    refusal(lambda: stream_of(mine, 8, 4, 0, rank=1, world_size=2))
    mine.verify(full=False)


def test_held_out_shards_are_verified_at_the_call(manifest: Manifest, tmp_path: Path) -> None:
    shutil.copytree(manifest.folder, tmp_path / "mine")
    mine = Manifest.load(tmp_path / "mine")
    held_out_rows([local(mine)], 8, 4)
    _flip(tmp_path / "mine" / "heldout-000000.tar")
    assert "altered" in refusal(lambda: held_out_rows([local(mine)], 8, 4))


def test_a_dataset_without_held_out_text(tmp_path: Path) -> None:
    manifest = make(tmp_path, TEXTS, held_out="none")
    message = refusal(lambda: held_out_rows([local(manifest)], 8, 4))
    assert "no shards of split 'heldout'" in message
    assert sorted(documents(manifest, "train", ByteTokenizer())) == sorted(TEXTS)


def test_no_region_of_a_shard_can_be_damaged_unnoticed(manifest: Manifest, tmp_path: Path) -> None:
    """A bit flipped in every 64 bytes (headers, members, padding, tail) and a cut at each of them:
    refused before training starts, every time."""
    shutil.copytree(manifest.folder, tmp_path / "mine")
    mine = Manifest.load(tmp_path / "mine")
    path = mine.folder / mine.split("train")[1].path
    whole = path.read_bytes()
    damaged = [whole[:at] for at in range(0, len(whole), 64)]
    for at in range(0, len(whole), 64):
        flipped = bytearray(whole)
        flipped[at + at // 64 % 64] ^= 1 << at // 64 % 8
        damaged.append(bytes(flipped))
    for data in damaged:
        path.unlink()
        path.write_bytes(data)
        message = refusal(lambda: stream_of(mine, 8, 4, 0))
        assert message.startswith(f"{path}: ")
        assert "truncated shard" in message or "altered shard" in message
    assert len(damaged) == 320
    path.write_bytes(whole)
    stream_of(mine, 8, 4, 0)


@pytest.mark.parametrize("name", ["../train-000000.tar", "/etc/passwd", "pipe:ls", "a.pickle"])
def test_a_manifest_names_files_of_its_folder_only(
    manifest: Manifest, tmp_path: Path, name: str
) -> None:
    shutil.copytree(manifest.folder, tmp_path / "mine")
    index = json.loads((tmp_path / "mine" / "index.json").read_text())
    index["shards"][0]["path"] = name
    (tmp_path / "mine" / "index.json").write_text(json.dumps(index))
    assert "shards.0.path: " in refusal(lambda: Manifest.load(tmp_path / "mine"))


def test_a_shard_that_is_cut_while_it_is_read(manifest: Manifest, tmp_path: Path) -> None:
    """An error with a name; a mapped file would have ended the process."""
    shutil.copytree(manifest.folder, tmp_path / "mine")
    mine = Manifest.load(tmp_path / "mine")
    reader = ShardReader(mine, "train", 8)
    reader.row(1, 20)
    os.truncate(mine.folder / mine.split("train")[1].path, 1024)
    message = refusal(lambda: reader.row(1, 20))
    assert "train-000001.tar: truncated shard: expected 10240 bytes, found 1024" in message
