"""Where things are in this project."""

from __future__ import annotations

from pathlib import Path

HELPERS = Path(__file__).parent
TESTS = HELPERS.parent
ROOT = TESTS.parent
CONFIGS = ROOT / "configs"
CORPORA = ROOT / "data_tools" / "corpora"
CORPUS = CORPORA / "tinyshakespeare.txt.gz"
