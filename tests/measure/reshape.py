"""The training state of every ZeRO stage on 1, 2 and 4 ranks, read by every stage on 1, 2 and 4:

    python -m tests.measure.reshape

Weights and moments must be the same, bit for bit, and the next five losses those of a run that was
never moved. The suite does a part of it (test_engine.py).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from engine_cases import run_cases, whole_state

RANKS, STAGES = (1, 2, 4), (1, 2, 3)
SAVED, LAST = 10, 15


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        expected = run_cases(folder, 2, [{"stage": 1, "steps": LAST}])[0]["losses"][SAVED:]
        for ranks in RANKS:
            saves: list[dict[str, Any]] = [
                {"stage": s, "steps": SAVED, "save": str(folder / f"{s} on {ranks}")}
                for s in STAGES
            ]
            run_cases(folder, ranks, saves)
        sources = [folder / f"{stage} on {ranks}" for stage in STAGES for ranks in RANKS]
        print("largest relative difference of a loss; = weights and moments are the same\n")
        print("to \\ from   " + "  ".join(f"{source.name:>9}" for source in sources))
        for ranks in RANKS:
            for stage in STAGES:
                cases = [
                    {
                        "stage": stage,
                        "first": SAVED,
                        "steps": LAST,
                        "load": str(source),
                        "resave": str(folder / f"{source.name} to {stage} on {ranks}"),
                    }
                    for source in sources
                ]
                cells = []
                for case, result in zip(cases, run_cases(folder, ranks, cases), strict=True):
                    pairs = zip(result["losses"], expected, strict=True)
                    worst = max(abs(a - b) / b for a, b in pairs)
                    before, after = (whole_state(Path(case[key])) for key in ("load", "resave"))
                    same = before.keys() == after.keys() and all(
                        torch.equal(before[key], after[key]) for key in before
                    )
                    cells.append(f"{worst:.1e} {'=' if same else '!'}")
                print(f"{stage} on {ranks}    " + "  ".join(cells), flush=True)


if __name__ == "__main__":
    main()
