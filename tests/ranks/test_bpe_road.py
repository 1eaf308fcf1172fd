"""The whole road with sentencepiece: tokenizer, shards, two steps, export, score, text."""

from __future__ import annotations

from pathlib import Path

import pytest
from paths import CORPUS
from ranks import hourglass

from hourglass_dist import train


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory, tiny_config: Path) -> Path:
    """A folder with the dataset, the run and the export of a BPE model."""
    folder = tmp_path_factory.mktemp("bpe")
    for arguments in (
        (
            "data",
            "tokenizer",
            CORPUS,
            "--kind",
            "bpe",
            "--vocab-size",
            512,
            "--out",
            folder / "tok",
        ),
        (
            *("data", "shard", CORPUS, "--tokenizer", folder / "tok", "--out", folder / "data"),
            *("--held-out", "last:0.1", "--block-tokens", 8192),
        ),
    ):
        done = hourglass(*arguments)
        assert done.returncode == 0, done.stderr
    settings = ["train.steps=2", "model.vocab_size=512", f"data.dataset={folder / 'data'}"]
    assert train.main([str(tiny_config), *settings, f"run.dir={folder / 'run'}"]) == 0
    done = hourglass("export", folder / "run", folder / "export")
    assert done.returncode == 0, done.stderr
    return folder


def test_every_byte_is_scored_whatever_the_tokens(bpe: Path) -> None:
    done = hourglass("evaluate", bpe / "export", "--data", bpe / "data")
    assert done.returncode == 0, done.stderr
    assert "111,540 bytes" in done.stdout  # as many as with bytes as tokens


@pytest.mark.slow
def test_a_prompt_that_is_no_text_is_refused(bpe: Path) -> None:
    done = hourglass("generate", bpe / "export", stdin=b"ROMEO \xff")
    assert done.returncode == 2
    assert done.stderr == (
        "error: prompt: expected UTF-8 for a sentencepiece tokenizer, given byte 0xff at offset 6\n"
    )
    done = hourglass("generate", bpe / "export", "--max-new-tokens", 9, stdin="Où?".encode())
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_an_export_and_a_dataset_of_other_tokenizers(bpe: Path, dataset: Path) -> None:
    done = hourglass("evaluate", bpe / "export", "--data", dataset)
    assert done.returncode == 2
    assert done.stderr.startswith("error: tokenizers differ: ")
    assert done.stderr.count("\n") == 1


def test_a_run_is_not_continued_on_other_tokens(
    bpe: Path, dataset: Path, tiny_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["train.steps=2", "model.vocab_size=512", f"run.dir={bpe / 'run'}"]
    assert train.main([str(tiny_config), *settings, f"data.dataset={dataset}"]) == 2
    assert "error: data: datasets differs" in capsys.readouterr().err
