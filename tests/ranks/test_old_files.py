"""What older commits wrote is read for good: settings, datasets, checkpoints, exports.

The files are in ``tests/old_files/COMMIT``; the README.md there says what made them. They are
used as a user does, through the command line, and must give what they gave then, up to rounding:
since 088aa9c matrix products in fp32 on CPUs went from oneDNN to MKL, torch's choice.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from golden_runs import processor
from paths import TESTS
from ranks import commands, hourglass

OLD = TESTS / "old_files" / "088aa9c"
RECORDED: dict[str, Any] = json.loads((OLD / "recorded.json").read_text())
SAVED, LAST = 3, 6
COMPARED = ("train/loss", "train/grad_norm", "train/lr", "heldout/loss")


def said_by(*given: list[object]) -> list[str]:
    """What these ``hourglass`` commands print, which all must end well."""
    done = commands(*given)
    assert [each.returncode for each in done] == [0] * len(given), [each.stderr for each in done]
    return [each.stdout for each in done]


def numbers(run: Path) -> dict[str, float]:
    """Everything compared that a run has noted after the step it was saved at."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {
        f"{name} of step {record['step']}": record[name]
        for record in records
        for name in COMPARED
        if name in record and record["step"] > SAVED
    }


def continued(name: str, folder: Path, *start: object) -> tuple[dict[str, float], str]:
    """The numbers, and the output, of a copy of an old run that goes on from its checkpoint."""
    run = folder / name
    shutil.copytree(OLD / "runs" / name, run)
    log = run / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(line for line in lines if json.loads(line)["step"] <= SAVED))
    assert not numbers(run)
    done = hourglass(*start, f"run.dir={run}", f"data.dataset={OLD / 'data/bytes'}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"continuing after step {SAVED}" in done.stdout
    return numbers(run), done.stdout


def test_datasets_are_whole_and_have_their_text(tmp_path: Path) -> None:
    names = list(RECORDED["data"])
    outs = {name: tmp_path / f"{name}.jsonl" for name in names}
    said_by(
        *(["data", "verify", OLD / "data" / name] for name in names),
        *(["data", "export-text", OLD / "data" / n, "--out", out] for n, out in outs.items()),
    )
    for name, out in outs.items():
        texts = [json.loads(line)["text"] for line in out.read_text().splitlines()]
        digest = hashlib.sha256("".join(f"{text}\0" for text in texts).encode()).hexdigest()
        assert digest == RECORDED["data"][name], name


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_two_ranks_go_on_with_a_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ZeRO-1 with AdamW and dropout, ZeRO-3 with Muon: the losses that the old code noted."""
    monkeypatch.setenv("VIRTUAL_ENV", sys.prefix)
    cluster = OLD / "settings" / "two_ranks.yaml"
    start = ("launch", "torchrun", "--cluster", cluster, OLD / "settings" / f"{name}.yaml")
    found, said = continued(name, tmp_path, *start)
    assert "2 x cpu" in said
    expected = numbers(OLD / "runs" / name)
    assert len(expected) == 3 * (LAST - SAVED) + 1
    tolerance = 2e-6 if RECORDED["processor"] == processor() else 1e-4
    assert found == pytest.approx(expected, abs=tolerance)


def test_one_rank_goes_on_with_a_run_of_two(tmp_path: Path) -> None:
    found, said = continued("muon", tmp_path, "train", OLD / "settings" / "muon.yaml")
    assert "1 x cpu" in said
    tolerance = 1e-5 if RECORDED["processor"] == processor() else 1e-4
    assert found == pytest.approx(numbers(OLD / "runs" / "muon"), abs=tolerance)


def test_exports_write_and_score_as_they_did() -> None:
    exports = {name: OLD / "exports" / name for name in RECORDED["exports"]}
    found = said_by(
        *(["generate", export, *RECORDED["asked"]] for export in exports.values()),
        *(["evaluate", export, "--data", OLD / "data/bytes"] for export in exports.values()),
    )
    texts = dict(zip(exports, found[: len(exports)], strict=True))
    scores = dict(zip(exports, found[len(exports) :], strict=True))
    assert texts == {name: said["text"] for name, said in RECORDED["exports"].items()}
    for name, line in scores.items():
        was = RECORDED["exports"][name]["score"]
        score = line.partition(": ")[2].strip()
        if RECORDED["processor"] == processor():
            assert score == was, name
        figures = [
            [float(x.replace(",", "")) for x in re.findall(r"[\d.,]+\d", s)] for s in (score, was)
        ]
        assert figures[0] == pytest.approx(figures[1], abs=2e-4), name
