"""Instruments of the developers: ``python -m tests.measure.NAME``, from the project's folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
