"""What a run leaves to be looked at: its page, its history, the first page of TensorBoard."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from pages import Page
from ranks import hourglass
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hourglass_dist.core.records import read_history, read_jsonl
from hourglass_dist.pages.plots import COLOURS, as_svg, line_plot, number
from hourglass_dist.report.page import cut_at_word, write_report


def copy_of(run: Path, folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        shutil.copy(run / name, folder / name)
    return folder


def test_the_page_of_a_finished_run(run_folder: Path, tmp_path: Path) -> None:
    done = hourglass("report", run_folder, "--out", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    page = Page(tmp_path / "page.html")
    for expected in ("1@1 2@2 1@1, 2 x cpu, fp32, ZeRO-2: finished", "20 of 20", "data.dataset"):
        assert expected in page.text
    for title in ("Bits per byte", "Gradient norm by level", "Own time of ranks", "Goodput"):
        assert title in page.text
    assert "train.precision" not in page.text  # a default
    assert page.text.index("held-out bits per byte at step 20") < page.text.index("Learning")


def test_the_figures_are_those_of_the_records(run_folder: Path, tmp_path: Path) -> None:
    """The newest score in large type, the newest values in the legends, and every point drawn."""
    records = read_jsonl(run_folder / "metrics.jsonl")
    write_report(run_folder, tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    newest = [r["heldout/bits_per_byte"] for r in records if "heldout/bits_per_byte" in r][-1]
    assert f"{newest:.4f}held-out bits per byte at step 20" in page.text
    for title, name in (
        ("Learning rate", "train/lr"),
        ("Gradient norm", "train/grad_norm"),
        ("Goodput", "train/goodput"),
    ):
        figure = next(text for text in page.figures if text.startswith(title))
        values = [record[name] for record in records if name in record]
        assert number(values[-1]) in figure
    [memory] = [text for text in page.figures if text.startswith("Memory")]
    assert " GiB, " in memory or " MiB, " in memory
    steps = len([record for record in records if "train/lr" in record])
    [line] = [path for path in page.paths("Learning rate") if path.count("L") == steps - 1]
    assert line


def test_equal_runs_give_equal_pages(run_folder: Path, tmp_path: Path) -> None:
    for name in ("a.html", "b.html"):
        write_report(run_folder, tmp_path / name)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_a_line_that_begins_far_above_the_rest_is_cut_with_a_mark() -> None:
    points = [(step, 8.0 if step == 0 else 3.0 - step / 60) for step in range(60)]
    svg = as_svg(line_plot({"loss": points}, {"loss": COLOURS[0]}), "loss")
    assert "cut off: up to 8" in svg
    whole = as_svg(line_plot({"loss": points[1:]}, {"loss": COLOURS[0]}), "loss")
    assert "cut off" not in whole


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Good morrow, neigh", ("Good morrow,", "neigh")),
        ("Good morrow,\n", ("Good morrow,", "")),
        ("neigh", ("neigh", "")),
        ("a " * 200 + "word end", ("… " + "a " * 117 + "word", "end")),
    ],
)
def test_prompts_are_cut_between_words(prompt: str, expected: tuple[str, str]) -> None:
    assert cut_at_word(prompt) == expected


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
