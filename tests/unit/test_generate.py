"""Sampling draws from the right distribution; generation sees the right context."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from zoo import LONGEST, make_config, make_model

from hourglass_dist.data.tokenizer import ByteTokenizer
from hourglass_dist.inference.generate import context_start, generate, generate_text, sample
from hourglass_dist.model.hourglass import HourglassLM

LOGITS = torch.tensor([0.5, 2.0, -1.0, 1.0, -40.0])


def frequencies(draws: int = 4000, **settings: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = [sample(LOGITS, generator=generator, **settings) for _ in range(draws)]  # type: ignore[arg-type]
    return torch.bincount(torch.tensor(ids), minlength=5) / draws


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax_at_a_temperature(temperature: float) -> None:
    wanted = (LOGITS / temperature).softmax(0)
    torch.testing.assert_close(frequencies(temperature=temperature), wanted, rtol=0, atol=0.025)


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-9}])
def test_the_narrowest_settings_take_the_likeliest(settings: dict[str, float]) -> None:
    assert frequencies(draws=50, **settings)[1] == 1


def test_a_temperature_near_zero_does_not_overflow() -> None:
    assert frequencies(draws=50, temperature=1e-300)[1] == 1


def test_top_k_keeps_that_many_with_their_proportions() -> None:
    wanted = torch.zeros(5)
    wanted[[1, 3]] = LOGITS[[1, 3]].softmax(0)
    torch.testing.assert_close(frequencies(top_k=2), wanted, rtol=0, atol=0.025)


def test_top_k_beyond_the_vocabulary_keeps_all() -> None:
    assert torch.equal(frequencies(top_k=1000), frequencies(top_k=0))


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    probabilities = LOGITS.softmax(0)  # 0.607, 0.223, 0.135 and 0.030 for the ids 1, 3, 0, 2
    for top_p, kept in ((0.6, [1]), (0.62, [1, 3]), (0.84, [0, 1, 3])):
        wanted = torch.zeros(5)
        wanted[kept] = probabilities[kept] / probabilities[kept].sum()
        torch.testing.assert_close(frequencies(top_p=top_p), wanted, rtol=0, atol=0.025)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature: expected a number of 0 or more, given -0.1"),
        ({"temperature": float("nan")}, "temperature: expected a number of 0 or more, given nan"),
        ({"top_k": -1}, r"top_k: expected 0 \(all\) or more, given -1"),
        ({"top_p": 0.0}, "top_p: expected more than 0 and at most 1, given 0.0"),
        ({"top_p": 1.5}, "top_p: expected more than 0 and at most 1, given 1.5"),
    ],
)
def test_nonsense_is_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(LOGITS, **settings)  # type: ignore[arg-type]


def test_the_context_is_cut_by_whole_strides_and_fits() -> None:
    for room in (8, 26):
        for stride in (1, 2, 3, 8):
            for length in range(1, 100):
                start = context_start(length, room, stride)
                assert start % stride == 0
                assert 1 <= length - start <= room
                assert start == 0 or length - start > room - stride, "more than needed was dropped"


def test_a_position_table_shorter_than_a_stride_leaves_one_token() -> None:
    assert context_start(11, 10, 16) == 10


@pytest.mark.parametrize("kind", ["lucidrains", "modern, words"])
def test_generation_continues_with_the_likeliest_tokens_however_long(kind: str) -> None:
    """With a position table it goes on from the newer half of the text when the table is full."""
    model = make_model(kind, "by 2, 4")  # strides of 8; a table of 48 for one of them
    ids, begin = [3, 1, 4], 0
    for token in generate(model, list(ids), 100, temperature=0):
        if kind == "lucidrains" and len(ids) - begin > LONGEST:
            begin = context_start(len(ids), LONGEST // 2, 8)
        with torch.no_grad():
            logits = model(torch.tensor([ids[begin:]]))[0, -1]
        assert token == logits.argmax()
        ids.append(token)
    assert len(ids) == 103
    assert begin % 8 == 0
    assert (begin > 0) == (kind == "lucidrains")


def test_generation_stops_before_the_end_of_text_and_never_leaves_the_vocabulary() -> None:
    model = make_model("lucidrains")
    tokens = list(generate(model, [0], 30, temperature=0))
    stop = tokens[5]
    assert (
        list(generate(model, [0], 30, temperature=0, eos_id=stop)) == tokens[: tokens.index(stop)]
    )
    generator = torch.Generator().manual_seed(0)
    assert max(generate(model, [0], 60, vocab_size=4, temperature=9.0, generator=generator)) == 3


def test_generation_needs_something_to_continue() -> None:
    with pytest.raises(ValueError, match="at least one token of context, given none"):
        next(generate(make_model("lucidrains"), [], 3))


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """A byte model that has not been trained, in the format of exports."""
    config = make_config("lucidrains", "by 3", max_seq_len=20)
    tokenizer = ByteTokenizer()
    about = {"format": 2, "model": asdict(config), "tokenizer": asdict(tokenizer.fingerprint)}
    (tmp_path / "config.json").write_text(json.dumps(about))
    save_file(HourglassLM(config).state_dict(), tmp_path / "model.safetensors")
    tokenizer.save(tmp_path)
    return tmp_path


def test_a_seed_gives_the_same_text_again_and_another_seed_another(export: Path) -> None:
    texts = ["".join(generate_text(export, "Où?".encode(), 30, seed=seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("prompt", [b"", b"x" * 45, b"\xff\xfe\x00"])
def test_any_bytes_are_a_prompt_for_a_byte_model(export: Path, prompt: bytes) -> None:
    text = "".join(generate_text(export, prompt, 8, top_k=90))
    assert len(text.encode()) >= 8 or "�" in text


def test_bad_sampling_settings_are_met_before_the_export_is_read() -> None:
    with pytest.raises(ValueError, match="top_k"):
        next(generate_text(Path("no such export"), b"", 3, top_k=-1))
