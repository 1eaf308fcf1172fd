"""Batches are well mixed, on a corpus whose documents come in the order of their topics."""

from __future__ import annotations

from pathlib import Path

from topics import ours


def test_batches_are_as_mixed_as_independent_draws(tmp_path: Path) -> None:
    assert 0.95 < ours(tmp_path, 50_000) < 1.05
