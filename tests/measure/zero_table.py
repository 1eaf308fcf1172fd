"""ZeRO against plain PyTorch over a table of settings: ``python -m tests.measure.zero_table``.

Two CPU ranks, 50 steps, the model and the data of ``toy.py``; the figure of a row is the largest
relative difference of the loss at any step. How far fp32 itself is from fp64, on one process and on
two ranks with PyTorch alone, is the yardstick: sums in another order differ by that much.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from ranks import run_worker
from toy import plain_pytorch

STEPS, RANKS, ROWS = 50, 2, 16
POLICIES = ("none", "full", "selective")


def apart(losses: Sequence[float], other: Sequence[float]) -> float:
    """The largest relative difference at any step."""
    return max(abs(a - b) / b for a, b in zip(losses, other, strict=True))


def run(cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results of these engines, one after the other, on ``RANKS`` ranks."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        run_worker(RANKS, "engine_worker.py", out, json.dumps(cases))
        results: list[dict[str, Any]] = json.loads(out.read_text())
        return results


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    plain = {
        kind: plain_pytorch(STEPS, kind, STEPS) for kind in ("fp64", "fp32", "autocast", "bf16")
    }
    kinds = ("fp32", "autocast", "bf16")
    found = run([{"plain": kind, "steps": STEPS} for kind in kinds])
    split = {kind: result["losses"] for kind, result in zip(kinds, found, strict=True)}
    print(f"{STEPS} steps, {RANKS} ranks: largest relative difference of the loss at any step\n")
    print(f"plain fp32, 1 process from plain fp64: {apart(plain['fp32'], plain['fp64']):.1e}")
    print(f"plain fp32, {RANKS} ranks from plain fp64: {apart(split['fp32'], plain['fp64']):.1e}")
    for kind in kinds:
        print(f"plain {kind}, {RANKS} ranks from 1 process: {apart(split[kind], plain[kind]):.1e}")
    for kind in kinds[1:]:
        print(f"plain {kind} from plain fp32: {apart(plain[kind], plain['fp32']):.1e}")
    print()
    print(
        "| stage | precision | passes | checkpointing | from fp32 | from fp64 | from plain bf16 |"
    )
    print("| ---: | --- | ---: | --- | ---: | ---: | ---: |", flush=True)
    for stage, precision in product(range(4), ("fp32", "bf16")):
        common = {"stage": stage, "precision": precision, "steps": STEPS, "total_steps": STEPS}
        settings = list(product((1, 4), POLICIES))
        cases = [
            common | {"micro_batch_size": ROWS // RANKS // passes, "checkpointing": policy}
            for passes, policy in settings
        ]
        for (passes, policy), result in zip(settings, run(cases), strict=True):
            losses = result["losses"]
            cells = [apart(losses, plain["fp32"]), apart(losses, plain["fp64"])]
            same = ""
            if precision == "bf16":
                kind = "autocast" if stage == 0 else "bf16"
                same = f"{apart(losses, plain[kind]):.1e}"
            shown = " | ".join(f"{cell:.1e}" for cell in cells)
            print(f"| {stage} | {precision} | {passes} | {policy} | {shown} | {same} |", flush=True)


if __name__ == "__main__":
    main()
