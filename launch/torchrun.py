"""torchrun, but a program that fails ends with its own exit code and words, not torchrun's."""

import logging
import signal
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from hourglass_dist.watch import watching

logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
try:
    with watching() as watcher:
        run.main()
except ChildFailedError as error:
    rank, failure = error.get_first_failure()
    if watcher and failure.pid in watcher.ended:  # it has said so
        sys.exit(1)
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        hint = " (often: out of memory)" if name == "SIGKILL" else ""
        print(f"rank {rank} was ended by {name}{hint}", file=sys.stderr)
        sys.exit(128 - failure.exitcode)
    if failure.exitcode not in (2, 75):
        print(f"rank {rank} ended with exit code {failure.exitcode}", file=sys.stderr)
    sys.exit(failure.exitcode)
except SignalException as error:  # the ranks had the signal, too, and time to save
    stopped = error.sigval in (signal.SIGTERM, signal.SIGUSR1)
    sys.exit(75 if stopped else 128 + error.sigval.value)
