"""SIGKILLs at random moments, each time another number of ranks: the run consumes exactly the rows
that an undisturbed one does. ``python -m tests.measure.stream_kills`` kills more often.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from stream_drill import drill


@pytest.mark.slow
def test_a_killed_run_consumes_the_rows_of_an_undisturbed_one(tmp_path: Path) -> None:
    assert drill(tmp_path / "drill", kills=2, steps=60, seed=1).startswith("2 kills")
