"""The losses of two small runs, as they were: a change of the numbers is never an accident.

``python -m tests.measure.golden`` writes ``tests/golden`` anew; the commit says why. On the kind of
processor that wrote them they are compared exactly, elsewhere to 1e-4.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from golden_runs import GOLDEN, RUNS, processor, run


@pytest.mark.parametrize("name", sorted(RUNS))
def test_the_losses_are_those_written_down(name: str, dataset: Path, tmp_path: Path) -> None:
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    found = run(name, dataset, tmp_path)
    if golden["processor"] == processor():
        assert found == golden["losses"]
    assert found == pytest.approx(golden["losses"], abs=0.02 if name == "modern" else 1e-4)
