"""Tokenizers lose nothing, count bytes exactly, and know one another."""

from __future__ import annotations

import io
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import sentencepiece
from datasets import NASTY, refusal
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import CORPORA
from ranks import hourglass

from data_tools.live_line import silent
from data_tools.train_tokenizer import Kind, _draw, train_tokenizer
from hourglass_dist.data.tokenizer import (
    STRETCH,
    ByteTokenizer,
    SentencePieceTokenizer,
    StreamDecoder,
    Tokenizer,
    load_tokenizer,
    require_same,
)

CORPUS = CORPORA
TEXTS = st.text() | st.lists(st.sampled_from([*NASTY[:10], "the ", "\n", " "])).map("".join)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for every kind."""
    folder = tmp_path_factory.mktemp("tokenizers")
    ByteTokenizer().save(_made(folder / "bytes"))
    for kind in ("unigram", "bpe"):
        size = 400 if kind == "unigram" else 600
        train_tokenizer(
            [CORPUS], folder / kind, kind=cast(Kind, kind), vocab_size=size, max_lines=3000
        )
    return {name: folder / name for name in ("bytes", "unigram", "bpe")}


@pytest.fixture(scope="module", params=["bytes", "unigram", "bpe"])
def tokenizer(trained: dict[str, Path], request: pytest.FixtureRequest) -> Tokenizer:
    return load_tokenizer(trained[request.param])


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def check_lossless(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids.tolist()) == text
    assert tokenizer.decode_bytes(ids.tolist()) == text.encode()
    assert tokenizer.byte_lengths()[ids].sum() == len(text.encode())
    assert tokenizer.eos_id not in ids
    assert tokenizer.encode_prompt(text.encode()) == ids.tolist()


@pytest.mark.parametrize("text", NASTY)
def test_nasty_text_is_lossless(tokenizer: Tokenizer, text: str) -> None:
    check_lossless(tokenizer, text)


@settings(deadline=None, max_examples=150)
@given(text=TEXTS)
def test_every_text_is_lossless(tokenizer: Tokenizer, text: str) -> None:
    check_lossless(tokenizer, text)


def test_real_text_takes_fewer_ids_than_bytes(trained: dict[str, Path]) -> None:
    text = "Before we proceed any further, hear me speak.\n" * 3
    for kind in ("unigram", "bpe"):
        tokenizer = load_tokenizer(trained[kind])
        check_lossless(tokenizer, text)
        assert len(tokenizer.encode(text)) < 0.7 * len(text)


def test_long_documents_are_their_stretches(tokenizer: Tokenizer) -> None:
    lines = [f"line {i} " * (i % 3) for i in range(2000)]
    for text in ("\n".join(lines), "x" * (3 * STRETCH + 1), " ".join(lines), " " * STRETCH * 2):
        check_lossless(tokenizer, text)
    alone = [id_ for line in lines for id_ in tokenizer.encode(line + "\n").tolist()]
    assert tokenizer.encode("\n".join(lines) + "\n").tolist() == alone


def test_specials_stand_for_no_bytes(tokenizer: Tokenizer) -> None:
    lengths = tokenizer.byte_lengths()
    assert lengths.shape == (tokenizer.vocab_size,)
    assert lengths.dtype == np.int64
    assert lengths[tokenizer.eos_id] == 0
    assert tokenizer.decode([tokenizer.eos_id]) == ""


@settings(deadline=None, max_examples=100)
@given(text=TEXTS, cuts=st.lists(st.integers(1, 5), min_size=1))
def test_streaming_gives_the_same_text(tokenizer: Tokenizer, text: str, cuts: list[int]) -> None:
    ids = tokenizer.encode(text).tolist()
    decoder, pieces, position = StreamDecoder(tokenizer), [], 0
    while position < len(ids):
        step = cuts[position % len(cuts)]
        pieces.append(decoder.feed(ids[position : position + step]))
        position += step
    assert "".join(pieces) == text  # every character has come before the flush
    assert decoder.flush() == ""


def test_streaming_waits_for_the_last_byte_of_a_character() -> None:
    decoder = StreamDecoder(ByteTokenizer())
    assert [decoder.feed([byte]) for byte in "\u4f60".encode()] == ["", "", "\u4f60"]
    assert decoder.feed([0xE4]) == ""
    assert decoder.flush() == "\ufffd"


def test_invalid_bytes_decode_to_replacement_characters() -> None:
    assert ByteTokenizer().decode([0x61, 0xC0, 0x62]) == "a\ufffdb"
    assert "expected 0 to 255, given 256" in refusal(lambda: ByteTokenizer().decode([256]))


def test_prompts_that_are_no_utf8(trained: dict[str, Path]) -> None:
    assert load_tokenizer(trained["bytes"]).encode_prompt(b"a\xc0") == [0x61, 0xC0]
    message = refusal(lambda: load_tokenizer(trained["bpe"]).encode_prompt(b"abc\xff"))
    assert "byte 0xff at offset 3" in message


def test_lone_surrogates_are_refused(tokenizer: Tokenizer) -> None:
    assert "U+D800 at character 2" in refusal(lambda: tokenizer.encode("ab\ud800"))


# --- identity ------------------------------------------------------------------------------------


def test_fingerprints_tell_tokenizers_apart(trained: dict[str, Path], tmp_path: Path) -> None:
    loaded = {name: load_tokenizer(folder) for name, folder in trained.items()}
    assert len({t.fingerprint for t in loaded.values()}) == 3
    for tokenizer in loaded.values():
        tokenizer.save(tmp_path)
        assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint
    a, b = loaded["bpe"].fingerprint, loaded["unigram"].fingerprint
    require_same(a, a, "the shards", "the export")
    message = refusal(lambda: require_same(a, b, "the shards", "the export"))
    assert "the shards" in message
    assert "the export" in message


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_training_is_deterministic(trained: dict[str, Path], kind: str, tmp_path: Path) -> None:
    """In another process: what is random only between processes would pass unseen in this one."""
    size = 400 if kind == "unigram" else 600
    done = hourglass(
        *("data", "tokenizer", CORPUS, "--out", tmp_path / "again", "--kind", kind),
        *("--vocab-size", size, "--max-lines", 3000),
    )
    fingerprint = load_tokenizer(trained[kind]).fingerprint
    assert load_tokenizer(tmp_path / "again").fingerprint == fingerprint
    assert fingerprint.model_sha256 in done.stdout


def test_the_draw_is_fair_and_follows_its_seed() -> None:
    lines = [str(i) for i in range(100)]
    drawn = [_draw(lines, 30, seed, silent) for seed in range(300)]
    assert len({tuple(draw) for draw in drawn}) == 300
    assert _draw(lines, 30, 7, silent) == drawn[7]
    assert {len(set(draw)) for draw in drawn} == {30}
    assert all(draw == sorted(draw, key=int) for draw in drawn)
    counts = Counter(line for draw in drawn for line in draw)
    assert all(50 < counts[line] < 130 for line in lines)  # 90 expected, deviation 8
    assert _draw(lines, 100, 0, silent) == lines


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _edit(**fields: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "tokenizer.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return edit


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "expected a tokenizer"),
        (lambda folder: (folder / "tokenizer.model").unlink(), "tokenizer.model: missing"),
        (lambda folder: _flip(folder / "tokenizer.model"), "tokenizer.model: altered"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "not valid JSON"),
        (lambda folder: (folder / "tokenizer.json").write_text("[]"), "expected a mapping"),
        (_edit(kind="words"), "kind: expected bytes or sentencepiece"),
        (_edit(vocab_sha256="0" * 64), "vocabulary 000000000000"),
        (_edit(vocab_size=7), "vocab_size: expected 600, given 7"),
        (_edit(eos_id=7), "eos_id: expected 1, given 7"),
        (_edit(extra=7), "extra: unknown key"),
    ],
)
def test_damaged_tokenizers(
    trained: dict[str, Path], tmp_path: Path, damage: Callable[[Path], object], expected: str
) -> None:
    folder = tmp_path / "mine"
    shutil.copytree(trained["bpe"], folder)
    damage(folder)
    message = refusal(lambda: load_tokenizer(folder))
    assert expected in message
    assert str(folder) in message


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"byte_fallback": False}, "byte_fallback"),
        ({"byte_fallback": True}, "changes text"),  # sentencepiece's own defaults normalise
        ({"byte_fallback": True, "add_dummy_prefix": False}, "changes text"),
    ],
)
def test_models_that_lose_text_are_refused(settings: dict[str, bool], expected: str) -> None:
    model = io.BytesIO()
    lines = iter(f"some text number {i}" for i in range(100))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, vocab_size=300, hard_vocab_limit=False,
        minloglevel=2, **settings,
    )  # fmt: skip
    assert expected in refusal(lambda: SentencePieceTokenizer(model.getvalue(), "a.model"))


def test_a_file_that_is_no_model_is_refused() -> None:
    message = refusal(lambda: SentencePieceTokenizer(b"not a model", "a.model"))
    assert message == "a.model: not a sentencepiece model"
