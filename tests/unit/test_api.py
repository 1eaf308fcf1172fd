"""The Python API on a real export."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import hourglass

import hourglass_dist


def test_nothing_is_imported_before_it_is_used() -> None:
    code = (
        "import sys, hourglass_dist\n"
        "assert not {'torch', 'pydantic', 'numpy'} & set(sys.modules)\n"
        "assert set(hourglass_dist.__all__) <= set(dir(hourglass_dist))\n"
        "for name in hourglass_dist.__all__: getattr(hourglass_dist, name)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        hourglass_dist.nothing  # noqa: B018


def test_it_generates_what_the_command_does(exported: Path) -> None:
    model = hourglass_dist.load(str(exported))
    first, second = model.generate(["To be", "or not"], max_new_tokens=20, seed=3)
    for prompt, text, seed in (("To be", first, 3), ("or not", second, 4)):
        options = ("--prompt", prompt, "--max-new-tokens", 20, "--seed", seed)
        assert hourglass("generate", exported, *options).stdout == f"{text}\n"
    with pytest.raises(ValueError, match="expected a list of texts, given one"):
        model.generate("To be")
    with pytest.raises(ValueError, match="temperature"):
        model.generate(["To be"], temperature=-1)


def test_a_score_is_the_sum_over_the_logits(exported: Path) -> None:
    model = hourglass_dist.load(exported)
    text = "Où être?"
    logits_LV = model.logits(text)
    ids = torch.tensor(list(text.encode()))
    assert logits_LV.shape == (len(ids) + 1, model.tokenizer.vocab_size)
    nats = torch.nn.functional.cross_entropy(logits_LV[:-1], ids, reduction="sum")
    [score, empty] = model.score([text, ""])
    assert score.nats == pytest.approx(float(nats), rel=1e-5)
    assert (score.tokens, score.bytes) == (len(ids), len(ids))
    assert (empty.nats, empty.tokens) == (0, 0)


def test_a_long_text_is_scored_as_evaluate_does(exported: Path, tmp_path: Path) -> None:
    """On a document of exactly one block, whose end-of-text id is in the next one."""
    text = "".join(chr(97 + i * i % 26) for i in range(256))
    (tmp_path / "text.txt").write_text(text)
    options = ("--held-out", f"input:{tmp_path / 'text.txt'}", "--block-tokens", 256)
    (tmp_path / "more.txt").write_text("more\n")
    made = hourglass("data", "shard", tmp_path / "more.txt", *options, "--out", tmp_path / "data")
    assert made.returncode == 0, made.stderr
    said = hourglass("evaluate", exported, "--data", tmp_path / "data").stdout
    [score] = hourglass_dist.load(exported).score([text])
    whole, last = score.nats, float(said.split()[5]) * 257 - score.nats
    assert "257 tokens, 256 bytes" in said
    assert 0 < last < 4 * math.log(256) < whole


def test_settings_are_checked_and_filled_in() -> None:
    written = {"dim": 32, "hierarchy": "1@1 2@4 1@1", "max_seq_len": 64}
    config = hourglass_dist.parse_model(written)
    assert isinstance(config, hourglass_dist.ModelConfig)
    module = hourglass_dist.HourglassLM(config)
    assert module(torch.zeros(1, 8, dtype=torch.int64)).shape == (1, 8, 256)
    with pytest.raises(ValueError, match=r"^model.dmi: unknown key .*did you mean model.dim\?$"):
        hourglass_dist.parse_model(written | {"dmi": 3})
