"""SIGKILLs at the worst moments: the weights in the end are those of an undisturbed run, bit for
bit, and nothing is left lying about. The suite kills a few times; the whole drill is a command:

    python tests/test_resume.py --kills 40 --steps 60 --seed 1
    python tests/test_resume.py --broken       the same with a rename that is not atomic: it fails
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from ranks import (
    TESTS,
    environment,
    hourglass,
    kill_tree,
    start_torchrun,
    torchrun,
    torchrun_command,
    wait_for_step,
)

from hourglass_dist.engine import sharded_state

STEPS = 60  # a save is over in milliseconds: enough of them for a busy machine to meet one
MOMENTS = ("in a step", "in a save", "after the rename", "after a resume")
VICTIMS = ("one rank", "all", "torchrun")


def command(config: Path, dataset: Path, run: Path, stage: int) -> list[str]:
    return [
        *("-m", "hourglass_dist.train", str(config), f"data.dataset={dataset}", f"run.dir={run}"),
        f"deepspeed.zero_optimization={{stage: {stage}, {PERSIST if stage == 3 else ''}}}",
    ]


def often(steps: int) -> list[str]:
    return [f"train.steps={steps}", "checkpoint.every=3", f"eval.every={steps}"]


PERSIST = "stage3_param_persistence_threshold: 0"  # or weights this small are not partitioned


def losses(run: Path) -> dict[int, float]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {r["step"]: r["train/loss"] for r in records if "train/loss" in r}


def last_step(run: Path) -> int:
    log = run / "metrics.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


def checkpoints(run: Path, pattern: str) -> set[str]:
    return {path.name for path in (run / "checkpoints").glob(pattern)}


class Drill:
    """Kills one run again and again."""

    def __init__(self, arguments: list[str], run: Path, seed: int) -> None:
        self.arguments, self.run, self.random = arguments, run, random.Random(seed)
        self.done: Counter[str] = Counter()
        self.log = run.with_suffix(".log")

    def start(self) -> subprocess.Popen[str]:
        with self.log.open("a") as log:
            return subprocess.Popen(
                torchrun_command(2, *self.arguments),
                stdout=log,
                stderr=log,
                text=True,
                env=environment(),
            )

    def kill(self, moment: str, victim: str) -> None:
        """Start or continue the run, and kill ``victim`` at ``moment``."""
        before = last_step(self.run)
        old = checkpoints(self.run, "step_*")
        process = self.start()
        came: dict[str, Callable[[], bool]] = {
            "in a step": lambda: (
                last_step(self.run) > before + 2 and bool(checkpoints(self.run, "step_*"))
            ),
            "in a save": lambda: bool(checkpoints(self.run, ".unfinished_*")),
            "after the rename": lambda: bool(checkpoints(self.run, "step_*") - old),
            "after a resume": lambda: "continuing after" in self.log.read_text()[-4000:],
        }
        deadline = time.monotonic() + 300
        while not came[moment]() and process.poll() is None:
            assert time.monotonic() < deadline, self.log.read_text()[-2000:]
            time.sleep(0.0005)
        time.sleep(self.random.uniform(0, 0.1 if moment == "in a step" else 0.004))
        if process.poll() is None:
            self.done[f"{moment}, {victim}"] += 1
            self._kill(process, victim)
        process.wait(timeout=120)

    def _kill(self, process: subprocess.Popen[str], victim: str) -> None:
        agent = psutil.Process(process.pid)
        ranks = agent.children(recursive=True)
        if victim == "all":
            kill_tree(process)
        elif victim == "torchrun" or not ranks:
            agent.kill()
        else:
            self.random.choice(ranks).kill()
        psutil.wait_procs(ranks, timeout=60)
        assert not [rank for rank in ranks if rank.is_running()], "a rank goes on without torchrun"

    def finish(self) -> None:
        assert self.start().wait(timeout=600) == 0, self.log.read_text()[-3000:]
        said = self.log.read_text()
        assert "damaged" not in said, [line for line in said.splitlines() if "damaged" in line]


def state(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint: weights and moments."""
    reader = sharded_state.Reader(run / "checkpoints" / f"step_{step:08d}")
    kinds = ("fp32", "exp_avg", "exp_avg_sq", "frozen")
    return {f"{k}/{name}": reader.full(k, name) for k in kinds for name in reader.names(k)}


def differences(run: Path, whole: Path, steps: int) -> list[str]:
    """What is not in the end as it is after an undisturbed run."""
    found = []
    ours, theirs = state(run, steps), state(whole, steps)
    found += [name for name in theirs if not torch.equal(ours[name], theirs[name])]
    found += [f"loss of step {s}" for s, x in losses(whole).items() if losses(run).get(s) != x]
    files = [
        {str(p.relative_to(r)) for p in r.rglob("*") if "tfevents" not in p.name}
        for r in (run, whole)
    ]
    return found + sorted(files[0] ^ files[1])


def drill(
    folder: Path, config: Path, dataset: Path, stage: int, kills: int, steps: int, seed: int = 0
) -> tuple[Counter[str], list[str]]:
    """The kills that were done, and the differences from an undisturbed run."""
    more = often(steps)
    whole, broken = folder / "whole", folder / "broken"
    done = torchrun(2, *command(config, dataset, whole, stage), *more)
    assert done.returncode == 0, done.stderr[-3000:]
    worker = os.environ.get("DRILL_WORKER")
    arguments = command(config, dataset, broken, stage) + more
    arguments = [worker, *arguments[2:]] if worker else arguments
    trial = Drill(arguments, broken, seed)
    choices = [(m, v) for m in MOMENTS for v in VICTIMS]
    trial.random.shuffle(choices)
    for kill in range(kills):
        moment, victim = choices[kill % len(choices)]
        trial.kill(moment if kill else "in a step", victim)
    trial.finish()
    return trial.done, differences(broken, whole, steps)


@pytest.mark.parametrize("stage", [1, 3])
def test_killed_and_continued_equals_undisturbed(
    tiny_config: Path, dataset: Path, tmp_path: Path, stage: int
) -> None:
    kills = 2 if stage == 1 else 1
    done, wrong = drill(tmp_path, tiny_config, dataset, stage, kills, steps=STEPS, seed=stage)
    assert done.total() == kills
    assert not wrong
    if stage == 1:
        arguments = command(tiny_config, dataset, tmp_path / "broken", stage)
        again = torchrun(2, *arguments, *often(STEPS))
        assert f"finished: all {STEPS} steps are done" in again.stdout


def test_one_rank_continues_what_two_began(
    tiny_config: Path, dataset: Path, tmp_path: Path
) -> None:
    """Another number of ranks, ZeRO stage and micro batch: the same losses up to rounding."""
    arguments = command(tiny_config, dataset, tmp_path / "run", 2)
    process = start_torchrun(2, *arguments)
    wait_for_step(process, tmp_path / "run", 12)
    kill_tree(process)
    whole = torchrun(1, *command(tiny_config, dataset, tmp_path / "whole", 2))
    again = torchrun(
        1, *arguments, "deepspeed.zero_optimization.stage=3", "train.micro_batch_size=4"
    )
    assert again.returncode == whole.returncode == 0, again.stderr[-3000:]
    for step, loss in losses(tmp_path / "whole").items():
        assert losses(tmp_path / "run")[step] == pytest.approx(loss, abs=1e-5)


def main() -> None:
    from conftest import CORPUS, TINY

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--broken", action="store_true")
    given = parser.parse_args()
    if given.broken:
        os.environ["DRILL_WORKER"] = str(TESTS / "careless_worker.py")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tiny.yaml").write_text(TINY)
        made = hourglass(
            "data", "shard", CORPUS, "--out", folder / "data", "--held-out", "last:0.1"
        )
        assert made.returncode == 0, made.stderr
        for stage in (1, 2, 3):
            share = (given.kills + 3 - stage) // 3
            (folder / str(stage)).mkdir()
            done, wrong = drill(
                *(folder / str(stage), folder / "tiny.yaml", folder / "data"),
                *(stage, share, given.steps, given.seed + stage),
            )
            print(f"ZeRO {stage}: {done.total()} kills; differences: {wrong or 'none'}", flush=True)
            for what, times in sorted(done.items()):
                print(f"    {times} x {what}")


if __name__ == "__main__":
    main()
