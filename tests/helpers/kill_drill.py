"""Kills a run at the worst moments, continues it, and compares it with an undisturbed one."""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from ranks import environment, kill_tree, torchrun, torchrun_command
from tiny_run import PERSIST, losses, state

MOMENTS = ("in a step", "in a save", "after the rename", "after a resume")

VICTIMS = ("one rank", "all", "torchrun")


def command(config: Path, dataset: Path, run: Path, stage: int) -> list[str]:
    return [
        *("-m", "hourglass_dist.train", str(config), f"data.dataset={dataset}", f"run.dir={run}"),
        f"deepspeed.zero_optimization={{stage: {stage}, {PERSIST if stage == 3 else ''}}}",
    ]


def often(steps: int) -> list[str]:
    return [f"train.steps={steps}", "checkpoint.every=3", f"eval.every={steps}"]


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
