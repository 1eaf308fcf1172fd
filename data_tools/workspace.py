"""How long steps tell how far they are."""

from __future__ import annotations

from collections.abc import Callable

Show = Callable[[str], None]
"""Shows a line about how far a long step is, over the line before."""


def silent(line: str) -> None:
    """Shows nothing."""
