"""Held-out scores: every target once whatever the windows, by source, by place in the bucket."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import local, make, plain_webdataset, refusal, words
from ranks import hourglass
from torch import Tensor
from zoo import make_model

from hourglass_dist.core import ranks
from hourglass_dist.data.batch import Batch
from hourglass_dist.data.held_out import held_out_rows
from hourglass_dist.data.mixture import Dataset
from hourglass_dist.data.tokenizer import ByteTokenizer
from hourglass_dist.inference.score import (
    Evaluation,
    Score,
    evaluate,
    evaluate_export,
    fixed_strides,
)
from hourglass_dist.model.hourglass import HourglassLM

LENGTHS = ByteTokenizer().byte_lengths()
EOS = ByteTokenizer().eos_id
BLOCK = 64


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> list[Dataset]:
    """Two with held-out text, one without; documents and windows run across blocks and shards."""
    texts = {"web": words(120, 1), "none": words(9, 2), "books": [*words(40, 3), "to be " * 90]}
    return [
        local(
            make(
                tmp_path_factory.mktemp(name),
                some,
                held_out="none" if name == "none" else "last:0.5",
            ),
            name,
        )
        for name, some in texts.items()
    ]


def text_of(dataset: Dataset) -> list[int]:
    blocks = plain_webdataset(dataset.manifest, "heldout")
    return [t for ids, about in blocks for t in ids[: about["tokens"]].tolist()]


def all_ranks(
    datasets: list[Dataset], context: int, rows: int, world: int, **options: object
) -> list[list[Batch]]:
    return [
        list(held_out_rows(datasets, context, rows, rank, world, **options))  # type: ignore[arg-type]
        for rank in range(world)
    ]


@pytest.mark.parametrize(
    ("context", "stride", "world", "rows"),
    [(16, 16, 1, 3), (16, 4, 1, 7), (64, 2, 2, 5), (96, 32, 3, 1), (128, 64, 1, 2), (24, 8, 5, 99),
     (8192, 64, 2, 2)],
)  # fmt: skip
def test_every_target_counts_once_with_all_the_context_it_should_have(
    datasets: list[Dataset], context: int, stride: int, world: int, rows: int
) -> None:
    ranks = all_ranks(datasets, context, rows, world, stride=stride)
    shapes = {tuple(tuple(batch.targets_BL.shape) for batch in batches) for batches in ranks}
    assert len(shapes) == 1, "the same forward passes on every rank"
    texts = {number: text_of(datasets[number]) for number in (0, 2)}
    done = {0: 0, 2: 0}
    for batch in (batch for batches in ranks for batch in batches):
        assert batch.sources_B is not None
        assert batch.tokens_BL.shape[1] == context
        for source, tokens, targets in zip(
            batch.sources_B.tolist(), batch.tokens_BL, batch.targets_BL, strict=True
        ):
            for place in (targets >= 0).nonzero()[:, 0].tolist():
                at, text = done[source], texts[source]
                assert targets[place] == text[at]
                assert place >= min(at, context - stride)
                begin = at - place
                first = EOS if begin % BLOCK == 0 else text[begin - 1]
                assert tokens[: place + 1].tolist() == [first, *text[begin:at]]
                done[source] += 1
    assert done == {number: len(text) for number, text in texts.items()}


def test_windows_that_do_not_fit_are_refused(datasets: list[Dataset]) -> None:
    message = refusal(lambda: held_out_rows(datasets, 64, 3, stride=7))
    assert message == "stride: 7 does not divide the context of 64 tokens"
    for stride, message in (
        (24, "stride: 24 does not divide the blocks of 64 tokens of "),
        (48, "sequence length: 48 does not divide the blocks of 64 tokens of "),
    ):
        rows = partial(held_out_rows, datasets, 48, 3, stride=stride)
        assert refusal(rows).startswith(message)


# --- scores --------------------------------------------------------------------------------------


def score(
    nats: Callable[[dict[str, Tensor | None]], Tensor],
    datasets: list[Dataset],
    context: int,
    stride: int,
    *,
    world: int = 1,
    places: int = 1,
    isolate: bool = False,
) -> Evaluation:
    """The scores of all ranks, one after another."""
    parts = [
        evaluate(nats, batches, LENGTHS, ranks.init(), [d.name for d in datasets], places)  # type: ignore[arg-type]
        for batches in all_ranks(
            datasets, context, 5, world, stride=stride, isolate_documents=isolate
        )
    ]
    none = Score(0.0, 0, 0)
    names = sorted({name for part in parts for name in part.sources})
    return Evaluation(
        {name: sum((part.sources.get(name, none) for part in parts), none) for name in names},
        tuple(sum(some, none) for some in zip(*(part.positions_S for part in parts), strict=True)),
    )


def blind(rows: dict[str, Tensor | None]) -> Tensor:
    """The nats of a model that sees nothing: they depend on the target only."""
    targets_BL = rows["targets_BL"]
    assert targets_BL is not None
    return (targets_BL + 1.5).double().log() * (targets_BL >= 0)


def nats_of(model: HourglassLM) -> Callable[[dict[str, Tensor | None]], Tensor]:
    def nats(rows: dict[str, Tensor | None]) -> Tensor:
        with torch.no_grad():
            nats_BL: Tensor = model(**rows, each_target=True)[0]
        return nats_BL

    return nats


@pytest.mark.parametrize("stride", [2, 16, 64])
def test_who_sees_nothing_has_one_score_whatever_the_windows(
    datasets: list[Dataset], stride: int
) -> None:
    """By source, and the whole is their sum; a source without held-out text has none."""
    found = score(blind, datasets, 64, stride)
    assert sorted(found.sources) == ["books", "web"]
    for dataset in (datasets[0], datasets[2]):
        text, mine = text_of(dataset), found.sources[dataset.name]
        assert mine.tokens == len(text)
        assert mine.bytes == sum(s.text_bytes for s in dataset.manifest.split("heldout"))
        assert mine.nats == pytest.approx(np.log(np.array(text) + 1.5).sum(), rel=1e-12)
        alone = score(blind, [dataset], 64, stride)
        assert alone.whole.nats == pytest.approx(mine.nats, rel=1e-12)
    parts = found.sources.values()
    assert found.whole.nats == sum(part.nats for part in parts)
    assert found.whole.tokens == sum(part.tokens for part in parts)
    assert found.whole.bytes == sum(part.bytes for part in parts)


@pytest.mark.parametrize("isolate", [False, True])
def test_ranks_share_the_work_and_not_the_score(datasets: list[Dataset], isolate: bool) -> None:
    model = make_model("modern", "by 2, 4").eval()
    options = {"places": 8, "isolate": isolate}
    one = score(nats_of(model), datasets, 48, 16, world=1, **options)  # type: ignore[arg-type]
    three = score(nats_of(model), datasets, 48, 16, world=3, **options)  # type: ignore[arg-type]
    for mine, other in zip(
        [*one.sources.values(), *one.positions_S],
        [*three.sources.values(), *three.positions_S],
        strict=True,
    ):
        assert (mine.tokens, mine.bytes) == (other.tokens, other.bytes)
        assert mine.nats == pytest.approx(other.nats, rel=1e-9)


@pytest.mark.parametrize("kind", ["lucidrains", "modern, words"])
def test_documents_kept_apart_are_scored_as_if_each_were_alone(tmp_path: Path, kind: str) -> None:
    """In windows that always hold the whole document: 16 new tokens, 32 before them."""
    texts = [word[:24] for word in words(60)]
    dataset = local(make(tmp_path, texts, held_out="last:0.5"))
    model = make_model(kind, "by 2, 4").eval()
    expected, document = 0.0, [EOS]
    for token in text_of(dataset):
        document.append(token)
        if token == EOS:
            row = torch.tensor([document])
            expected += float(
                nats_of(model)({"tokens_BL": row[:, :-1], "targets_BL": row[:, 1:]}).sum()
            )
            document = [EOS]
    found = score(nats_of(model), [dataset], 48, 16, isolate=True)
    assert found.whole.nats == pytest.approx(expected, rel=1e-9)
    assert score(nats_of(model), [dataset], 48, 16).whole.nats != pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("isolate", [False, True])
def test_a_stale_summary_shows_at_its_places(datasets: list[Dataset], isolate: bool) -> None:
    """A fault of the last positions of a bucket is seen there, and nowhere else: 8 to a bucket."""
    model = make_model("modern", "by 2, 4").eval()  # no layers after the way back
    assert fixed_strides(model.config) == [1, 2, 8]
    healthy = score(nats_of(model), datasets, 64, 64, places=8, isolate=isolate)

    def fault(_: object, given: tuple[Any, ...], out: Tensor) -> Tensor:
        rows = given[2].rows
        position_BL = (
            torch.arange(out.shape[1])[None] if rows.position_BL is None else rows.position_BL
        )
        return out + 3.0 * (position_BL % 8 >= 6)[..., None]

    handle = model.hourglass.lengthen.register_forward_hook(fault)
    broken = score(nats_of(model), datasets, 64, 64, places=8, isolate=isolate)
    handle.remove()
    for place, (before, after) in enumerate(
        zip(healthy.by_place(8), broken.by_place(8), strict=True)
    ):
        assert (after.nats != before.nats) == (place >= 6)
        assert after.bytes == before.bytes
    for stride in (1, 2, 8):
        places = broken.by_place(stride)
        bits = sum(place.bits_per_byte * place.bytes for place in places)
        assert bits / sum(place.bytes for place in places) == pytest.approx(
            broken.whole.bits_per_byte, rel=1e-12
        )


def test_buckets_of_words_have_no_places() -> None:
    assert fixed_strides(make_model("modern, words", "by 2, 4").config) == [1]


@pytest.mark.slow
def test_windows_of_an_export(exported: Path, dataset: Path) -> None:
    """More context is a better score; what does not fit is one line."""
    plain, short, sliding = (
        evaluate_export(exported, str(dataset), 64, context, stride)[0].whole
        for context, stride in ((None, None), (16, None), (None, 32))
    )
    assert sliding.loss < plain.loss < short.loss
    assert sliding.bytes == plain.bytes == short.bytes == 111_540
    command = ("evaluate", exported, "--data", dataset, "--batch-size", "64")
    done = hourglass(*command, "--stride", "32")
    assert done.returncode == 0, done.stderr
    assert f"{sliding.bits_per_byte:.4f} bits/byte" in done.stdout
    assert "111,540 bytes; 64 tokens every 32)" in done.stdout
    done = hourglass(*command, "--context", "4096")
    assert done.returncode == 2
    assert done.stderr == (
        f"error: context: 4096 is longer than the position table of {exported}, max_seq_len=64\n"
    )
