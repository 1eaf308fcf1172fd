"""A worker process: runs the given tasks one after another, and writes errors into the folder.

    worker OUT/work                         "STEP INDEX" lines on stdin; a line answers each
    worker OUT/work STEP LIST FIRST EVERY   every EVERY-th index in the file LIST, from FIRST on

The first kind ends with its stdin, so that none is left when the pipeline is killed.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

from data_tools.pipeline.steps import BY_NAME
from data_tools.pipeline.workspace import Work, do_task


def work_on(root: Path, step: str, index: int) -> None:
    """Run one task; write an exception into the folder instead of raising it."""
    try:
        do_task(Work(root), step, index, BY_NAME[step].run)
    except Exception as error:  # a bug: the traceback goes into a file, its last line to the user
        log = root / step / "error" / f"traceback-{index}.txt"
        log.write_text(traceback.format_exc())
        short = " ".join(f"{type(error).__name__}: {error}".split())
        (root / step / "error" / str(index)).write_text(f"{short} (all of it: {log})")


def main(arguments: list[str]) -> None:
    """Run the tasks that the arguments or the lines of stdin name."""
    root = Path(arguments[0])
    if len(arguments) > 1:
        step, listed, first, every = arguments[1:]
        for index in json.loads(Path(listed).read_bytes())[int(first) :: int(every)]:
            work_on(root, step, index)
        return
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # prints of libraries go to the log
    for line in sys.stdin:
        step, index = line.split()
        work_on(root, step, int(index))
        print("done", file=answers)


if __name__ == "__main__":
    main(sys.argv[1:])
