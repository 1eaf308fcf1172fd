"""One line of progress on stderr during a long step."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

LOG_EVERY_S = 30.0

Show = Callable[[str], None]
"""Function that shows a line in place of the line before."""


def silent(line: str) -> None:
    """Show nothing."""


@contextmanager
def live_line() -> Iterator[Show]:
    """Yield a function that shows a line on stderr: in place of the last one on a terminal, else as
    a new line at most every 30 seconds."""
    console = Console(stderr=True)
    shown = time.monotonic()

    def log(line: str) -> None:
        nonlocal shown
        if time.monotonic() - shown > LOG_EVERY_S:
            shown = time.monotonic()
            print(line, file=sys.stderr, flush=True)

    if not console.is_terminal:
        yield log
        return
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("")
        yield lambda line: progress.update(task, description=line)
