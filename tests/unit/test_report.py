"""What a run leaves to be looked at: its page, its history, the first page of TensorBoard."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from ranks import hourglass
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hourglass_dist.core.records import read_history
from hourglass_dist.report.page import write_report

VOID = {"meta", "rect", "path", "circle"}


class Page(HTMLParser):
    """Checks that every tag is closed and nothing is loaded; collects text and tags."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(path.read_text())
        assert not self.open
        assert not {"script", "link", "img", "iframe", "object", "use"} & set(self.tags)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert not {"src", "href", "onload", "onclick"} & {name for name, _ in attrs}
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def copy_of(run: Path, folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        shutil.copy(run / name, folder / name)
    return folder


def test_the_page_of_a_finished_run(run_folder: Path, tmp_path: Path) -> None:
    done = hourglass("report", run_folder, "--out", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    page = Page(tmp_path / "page.html")
    for expected in ("1@1 2@2 1@1, 2 x cpu, fp32, ZeRO-2: finished", "20 of 20", "dataset: "):
        assert expected in page.text
    for title in ("Bits per byte", "Gradient norm by level", "Own time of ranks", "Goodput"):
        assert title in page.text
    assert "@import" not in page.text
    assert "url(h" not in page.text


def test_what_is_missing_is_left_out_and_what_is_there_is_escaped(
    run_folder: Path, tmp_path: Path
) -> None:
    """The folder of a run that goes on: a line half written, no history, texts of all kinds."""
    run = copy_of(run_folder, tmp_path / "a <b> & c", "config.yaml", "metrics.jsonl")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "heldout/<i>x/bits_per_byte": 2.5}\n{"step": 22, "trai')
    evil = "</p><script>alert(1)</script>"
    sample = {"step": 20, "prompt": evil, "text": evil + "\0\n" + evil}
    (run / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    places = [{"step": step, "stride": 4, "bits_per_byte": [8, 7.5, None, 7]} for step in (10, 20)]
    (run / "positions.jsonl").write_text("".join(json.dumps(place) + "\n" for place in places))
    skipped = {"step": 3, "loss": evil, "rows": [16, 24]}
    (run / "skipped.jsonl").write_text(json.dumps(skipped) + "\n")
    write_report(run, run / "report.html")
    page = Page(run / "report.html")
    assert "a <b> & c" in page.text
    assert page.text.count(evil) == 3
    assert "Held out, by source" in page.text
    assert "<i>x" in page.text
    assert "Buckets of 4" in page.text
    assert "Starts" not in page.text


def test_no_run_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no metrics\.jsonl: expected") as error:
        write_report(tmp_path, tmp_path / "page.html")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_run_says_when_it_began_and_how_it_ended(run_folder: Path) -> None:
    start, end = read_history(run_folder)
    assert (start["event"], start["step"], start["ranks"]) == ("start", 0, 2)
    assert set(start["versions"]) == {"hourglass_dist", "torch", "deepspeed"}
    assert (end["event"], end["step"], end["reason"]) == ("end", 20, "finished")
    assert end["time"] > start["time"]


def test_records_add_up(run_folder: Path) -> None:
    """Time of steps, share of it, ranks in order, bytes per token of a byte tokenizer."""
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "train/loss" in record]
    useful = [record["time/useful_seconds"] for record in records]
    assert useful == sorted(useful)
    for record in records:
        assert 0 < record["train/goodput"] <= 1
        low, middle, high = (record[f"ranks/seconds_{name}"] for name in ("min", "median", "max"))
        assert 0 < low <= middle <= high
        assert record["train/slowest_rank"] in (0, 1)
        assert 0 < record["memory/resident_bytes"] <= record["memory/peak_bytes"] * 1.01
        ratio = record["train/bytes_per_second"] / record["train/tokens_per_second"]
        assert 0.95 < ratio <= 1  # a document's end is a token of no bytes


def test_tensorboards_reader_finds_plan_settings_and_model(run_folder: Path) -> None:
    events = EventAccumulator(str(run_folder))
    events.Reload()
    texts = {"plan": "FLOPs/token", "config": "seq_len: 64", "model": "level 1, by 2: 2 layers"}
    for name, expected in texts.items():
        [event] = events.Tensors(f"{name}/text_summary")
        assert expected in event.tensor_proto.string_val[0].decode()
    assert {"grad_norm/level_1", "activation_rms/level_0"} <= set(events.Tags()["scalars"])
