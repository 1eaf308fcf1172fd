"""Kills a run at random moments, continues it on other numbers of ranks, and counts its rows."""

from __future__ import annotations

import json
import random
import subprocess
import time
from pathlib import Path

from datasets import make, words
from paths import HELPERS
from ranks import environment, kill_tree, torchrun_command

from hourglass_dist.core.records import read_history

WORLDS = (1, 2, 3, 4)

SETTINGS = """
run: {dir: RUN}
data:
  sources:
    - {name: web, path: WEB, weight: 3}
    - {name: books, path: BOOKS}
  seq_len: 32
  batch_size: 24
  phases:
    - {until_step: FIRST, batch_size: 12}
    - {until_step: THEN, seq_len: 16, weights: {books: 2}}
model: {dim: 16, heads: 2, max_seq_len: 32, levels: [{layers: [1, 1]}, {layers: 1, shorten: 2}]}
optim: {lr: 1e-3}
train: {steps: STEPS, micro_batch_size: MICRO}
eval: {every: 150, batch_size: 64}
checkpoint: {every: 10}
metrics: {every: 1}
"""


class Drill:
    """One run in a folder, killed and continued; the rows of all its launches."""

    def __init__(self, folder: Path, steps: int, seed: int) -> None:
        self.folder, self.steps = folder, steps
        self.random, self.launches = random.Random(seed), 0
        for name in ("WEB", "BOOKS"):
            (folder / name).mkdir(parents=True)
            make(folder / name, words(200, seed=len(name)), held_out="hash:0.05")
        (folder / "rows").mkdir()

    def start(self, world: int, run: str) -> subprocess.Popen[str]:
        """Begin or continue ``run`` on ``world`` ranks."""
        text = SETTINGS.replace("RUN", str(self.folder / run))
        for name in ("WEB", "BOOKS"):
            text = text.replace(name, str(self.folder / name / "dataset"))
        third = self.steps // 6 * 2  # phases of rows of half the length take even steps
        numbers = {"FIRST": third, "THEN": 2 * third, "STEPS": self.steps, "MICRO": 12 // world}
        for name, number in numbers.items():
            text = text.replace(name, str(number))
        config = self.folder / f"{run}.yaml"
        config.write_text(text)
        self.launches += 1
        rows = self.folder / "rows" / run
        rows.mkdir(exist_ok=True)
        return subprocess.Popen(
            torchrun_command(world, str(HELPERS / "drill_worker.py"), str(rows), str(config)),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=environment() | {"LAUNCH": f"{self.launches:03}"},
        )

    def finish(self, world: int, run: str) -> None:
        """Let ``run`` go to its end."""
        process = self.start(world, run)
        try:
            _, stderr = process.communicate(timeout=600)
        finally:
            if process.poll() is None:
                kill_tree(process)
        assert process.returncode == 0, stderr[-3000:]

    def kill_once(self, world: int, run: str) -> bool:
        """Continue ``run`` and kill all its ranks at a random moment; whether that came in time."""
        process = self.start(world, run)
        first = self.folder / "rows" / run / f"{self.launches:03}-0"
        deadline = time.monotonic() + 300
        training = self.random.random() < 0.85  # else somewhere in its start
        while training and not first.exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(self.random.uniform(0, 1.5 if training else 6))
        alive = process.poll() is None
        kill_tree(process) if alive else process.communicate()
        assert alive or process.returncode == 0, "it ended by itself, and badly"
        return alive

    def rows(self, run: str) -> tuple[dict[int, list[tuple[int, int]]], int]:
        """Step -> (row, checksum of its targets) of the global batch, and how many steps were done
        more than once.

        A step that was repeated after a kill must have consumed the same rows as before.
        """
        steps: dict[int, list[tuple[int, int]]] = {}
        again = 0
        files = sorted((self.folder / "rows" / run).iterdir())
        for launch in sorted({file.name.partition("-")[0] for file in files}):
            ranks = [
                [json.loads(line) for line in file.read_text().splitlines()]
                for file in sorted(file for file in files if file.name.startswith(launch))
            ]
            for parts in zip(*ranks, strict=False):  # the last step may miss a killed rank
                assert len({part["step"] for part in parts}) == 1
                batch = [
                    pair
                    for part in parts
                    for pair in zip(part["rows"], part["content"], strict=True)
                ]
                again += parts[0]["step"] in steps
                assert steps.setdefault(parts[0]["step"], batch) == batch
        return steps, again


def drill(folder: Path, kills: int, steps: int, seed: int) -> str:
    """Kill a run ``kills`` times and compare it with an undisturbed one; returns what happened."""
    drill = Drill(folder, steps, seed)
    drill.finish(2, "whole")
    expected, _ = drill.rows("whole")
    assert sorted(expected) == list(range(1, steps + 1))
    worlds: list[int] = []
    while len(worlds) < kills:
        world = drill.random.choice([w for w in WORLDS if w != (worlds or [0])[-1]])
        if not drill.kill_once(world, "killed"):
            break
        worlds.append(world)
    drill.finish(2, "killed")
    events = [entry["event"] for entry in read_history(folder / "killed")]
    assert events.count("end") == 1, "a killed process says nothing"
    assert events[-2:] == ["start", "end"]
    found, again = drill.rows("killed")
    assert found == expected
    rows = [row for step in sorted(found) for row, _ in found[step]]
    assert rows == list(range(len(rows))), "every row once, in order"
    return (
        f"{len(worlds)} kills on {', '.join(map(str, worlds))} ranks; {steps} steps, {again} of "
        f"them repeated after a kill; {len(rows)} rows: none twice, none missing, the same "
        "targets as undisturbed"
    )
