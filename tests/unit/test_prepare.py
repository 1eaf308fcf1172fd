"""Preparing a corpus: nothing is lost, and who did the work makes no difference."""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path

import pytest
import webdataset
from corpora import FULL, all_texts, run, settings, shard_hashes, texts, write_jsonl
from datasets import NASTY, make, refusal
from pages import Page

from data_tools.datasets.verify import verify
from data_tools.pipeline.prepare import prepare
from data_tools.pipeline.report import Report
from data_tools.shard import make_dataset, plan_dataset
from hourglass_dist.data.tokenizer import ByteTokenizer


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """240 texts, 20 of them twice, 20 nearly twice, 10 too short ones; one with an address."""
    folder = tmp_path_factory.mktemp("corpus")
    first = texts(240)
    first[7] += "\nWrite to somebody@host.example.net from 8.8.8.8 at once."
    near = [text.replace("Text 0", "Text nought") for text in first[40:60]]
    short = [f"short {i}" for i in range(10)]
    return [
        write_jsonl(folder / "a.jsonl", first),
        write_jsonl(folder / "b.jsonl", [*first[:20], *near, *short]),
    ]


@pytest.fixture(scope="module")
def finished(corpus: list[Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """The folder and the report of a run with everything on."""
    folder = tmp_path_factory.mktemp("finished")
    report = run(folder, *corpus, **FULL)
    return folder / "out", report


def test_documents_in_are_documents_out(finished: tuple[Path, Report]) -> None:
    out, report = finished
    assert report.documents["read"] == 290
    assert report.documents["quarantined"] == 0
    assert report.documents["dropped"] == sum(report.dropped.values())
    assert report.documents["kept"] == 290 - report.documents["dropped"]
    assert report.dropped["too short"] == 10
    assert report.dropped["exact duplicate"] == report.groups["exact"]["2"] == 20
    assert report.dropped["near duplicate"] == report.groups["near"]["2"] == 20
    found = all_texts(out)
    assert len(found) == report.documents["kept"] == len(set(found))
    assert report.bytes["kept"] == sum(len(text.encode()) for text in found)
    assert Report.load(out) == report


def test_what_is_left_is_the_first_of_each(
    finished: tuple[Path, Report], corpus: list[Path]
) -> None:
    found = set(all_texts(finished[0]))
    first = [json.loads(line)["text"] for line in corpus[0].read_text().splitlines()]
    first[7] = first[7].replace("somebody@host.example.net", "email@example.com")
    first[7] = first[7].replace("8.8.8.8", "22.214.171.124")
    assert found == set(first)


def test_the_datasets_are_whole(finished: tuple[Path, Report]) -> None:
    out, report = finished
    manifest = verify(out / "corpus")
    assert (
        sum(s.tokens for s in manifest.split("train")) == report.sources["corpus"]["train_tokens"]
    )
    for shard in manifest.shards:
        path = str(manifest.folder / shard.path)
        assert len(list(webdataset.WebDataset(path, shardshuffle=False))) == shard.blocks
    assert sorted(path.name for path in out.iterdir()) == [
        *("corpus", "inputs.json", "quarantine.jsonl", "report.html", "report.json"),
        *("settings.yaml", "tokenizer"),
    ]


def test_the_page_shows_it_all(finished: tuple[Path, Report]) -> None:
    out, report = finished
    page = Page(out / "report.html")
    assert report.lines()[0] in page.text
    left = report.documents["read"]
    for reason, count in report.dropped.items():
        left -= count
        assert f"{reason}{count:,}{left:,}" in page.text
    assert page.tags.count("svg") == len(page.figures) == 2
    assert len([sample for sample in report.samples if not sample["reason"]]) == 20
    assert page.tags.count("article") == len(report.samples) == 40


@pytest.mark.parametrize(
    "changes",
    [
        {"executor": {"workers": 3}, "task_bytes": 3_000},
        {"task_bytes": 10_000_000},
    ],
)
def test_workers_and_tasks_make_no_difference(
    finished: tuple[Path, Report], corpus: list[Path], tmp_path: Path, changes: dict[str, object]
) -> None:
    report = run(tmp_path, *corpus, **FULL | changes)
    assert shard_hashes(tmp_path / "out") == shard_hashes(finished[0])
    for name in ("documents", "dropped", "sources", "groups", "samples", "sizes"):
        assert getattr(report, name) == getattr(finished[1], name)


def test_sources_become_datasets_of_text_that_comes_back(tmp_path: Path) -> None:
    """Two sources that share documents; nasty texts, specials of the tokenizer spelled out among
    them; a broken text that is repaired, a decomposed one that is composed."""
    changed = "\0\x7f\x85\ufeff"  # by the repair, or refused
    nasty = [text for text in NASTY if text and not set(text) & set(changed)]
    nasty = [unicodedata.normalize("NFC", text) for text in nasty]
    mine, others = texts(100), texts(50, seed=1)
    write_jsonl(tmp_path / "a.jsonl", [*mine, "caf\u00c3\u00a9 and e\u0301 of it"])
    write_jsonl(tmp_path / "b.jsonl", [*mine[:30], *others, *nasty])
    report = run(
        tmp_path,
        sources=[{"name": n, "inputs": [str(tmp_path / f"{n}.jsonl")]} for n in ("b", "a")],
        tokenizer={"kind": "bpe", "vocab_size": 330, "sample_bytes": 20_000},
        normalise={"repair": True, "unicode": "NFC"},
    )
    assert (report.sources["a"]["kept"], report.sources["a"]["dropped"]) == (71, 30)
    a, b = (verify(tmp_path / "out" / name) for name in ("a", "b"))
    assert a.tokenizer == b.tokenizer
    assert (a.recipe.source, b.recipe.source) == ("a", "b")
    expected = [*mine, *others, *nasty, "caf\u00e9 and \u00e9 of it"]
    assert sorted(all_texts(tmp_path / "out")) == sorted(expected)


@pytest.mark.parametrize("task_bytes", [3_000, 10_000_000])
def test_without_filters_it_makes_the_dataset_of_shard(tmp_path: Path, task_bytes: int) -> None:
    """The same shards under the same id, empty and repeated documents among them."""
    a = write_jsonl(tmp_path / "in" / "a.jsonl", [*texts(120), "", *texts(3)])
    (tmp_path / "in" / "b.txt").write_text("one--two----three " + "long " * 1000)
    c = write_jsonl(tmp_path / "in" / "c.jsonl", ["", *texts(60, seed=1)])
    inputs = [a, tmp_path / "in" / "b.txt", c]
    source = {"name": "corpus", "inputs": [str(path) for path in inputs], "separator": "--"}
    run(tmp_path, sources=[source], task_bytes=task_bytes, dedup={"exact": False}, seed=7)
    spec = plan_dataset(
        inputs, ByteTokenizer(), held_out="hash:0.1", separator="--", source="corpus", seed=7,
        block_tokens=1024, shard_blocks=8,
    )  # fmt: skip
    manifest = make_dataset(spec, tmp_path / "dataset")
    assert manifest.empty_documents == 3
    assert verify(tmp_path / "out" / "corpus").dataset_id == manifest.dataset_id


def test_what_is_there_is_not_done_again(tmp_path: Path, corpus: list[Path]) -> None:
    said: list[str] = []
    wanted = settings(tmp_path, *corpus)
    assert "--step: 'read' has to be done first" in refusal(
        lambda: prepare(wanted, only="tokens", say=said.append)
    )
    assert prepare(wanted, only="read", say=said.append) is None
    assert prepare(wanted, only="exact", say=said.append) is None
    assert re.match(r"read +\d+ tasks, 290 documents, .* of them done before", said[1])
    report = prepare(wanted, say=said.append)
    assert report is not None
    assert prepare(wanted, say=said.append) == report
    assert said[-1].endswith("already there")
    make(tmp_path, ["a"] * 10, held_out="none")
    other = wanted.model_copy(update={"out": str(tmp_path / "dataset")})
    assert "was not made by 'hourglass data prepare'" in refusal(lambda: prepare(other))
