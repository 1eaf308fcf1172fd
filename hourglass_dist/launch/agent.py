"""torchrun's agent, the process on each node that starts the ranks and looks after them.

It is torch's, with other answers to what happens:

    a rank ends with 2 or 75     torch starts it again; here the run ends, with that exit code
    a node comes                 ranks save and end with 75 on all nodes, and start again with it
    the store is lost            the node where all meet is down: the others wait for the next one
    a node does not come         who is there, and who is not, in one line
    a rank dies beside others    they have seconds to end in, not the minutes that saving may take
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import FrameType
from typing import Any

from torch.distributed import DistError
from torch.distributed import run as untyped_run
from torch.distributed.elastic.agent.server.api import (
    DEFAULT_ROLE,
    RunResult,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous.api import (
    RendezvousClosedError,
    RendezvousError,
    RendezvousGracefulExitError,
    RendezvousTimeoutError,
)
from torch.distributed.launcher import api as untyped_api

from hourglass_dist.core.exit_codes import BAD_INPUT, DONE, STOPPED
from hourglass_dist.health.watcher import Watcher, watching
from hourglass_dist.launch.rendezvous import Meeting, own_address, say

run: Any = untyped_run
api: Any = untyped_api

SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1")
HOPELESS = 30
"""Seconds that ranks have to end when others are gone: they can no longer save."""
RESTART = "hourglass/restart"
"""Key in the store of one round: nodes come or go, so ranks that end with 75 are wanted again."""


class Apart(SignalException):
    """The nodes of this run are no longer, or not yet, together; the cause says why. A signal for
    torch, which after any other exception would close the meeting for all of them."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(str(cause), signal.SIGTERM)
        self.__cause__ = cause


class Agent(LocalElasticAgent):
    """See the top of this file."""

    meeting: Meeting | None = None
    """Where the nodes meet; None: there is one node, or they are counted beforehand."""
    watcher: Watcher | None = None
    """Over the ranks of this node."""

    def __init__(self, spec: WorkerSpec, *args: Any, **kwargs: Any) -> None:
        super().__init__(spec, *args, **kwargs)
        self._patience = self._shutdown_timeout
        if self.meeting:
            self.meeting.watch(spec.rdzv_handler)

    def run(self, role: str = DEFAULT_ROLE) -> RunResult:
        """Until the run has ended on all nodes."""
        code = STOPPED
        try:
            result: RunResult = super().run(role)
            code = exit_code(result.failures) if result.is_failed() else 0
        except Apart:
            code = 0
            raise
        finally:
            nodes = self._worker_group.group_world_size or 1
            if self.meeting and code:  # torch itself waits for the others when all is well
                self.meeting.part(self._handler._store, code, nodes)
        return result

    def _invoke_run(self, role: str = DEFAULT_ROLE) -> RunResult:
        try:
            result: RunResult = super()._invoke_run(role)
            return result
        except (RendezvousError, DistError) as error:
            self._patience = min(HOPELESS, self._shutdown_timeout)
            raise Apart(error) from error

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        if self.meeting:
            self.meeting.gather(self._handler)
        super()._rendezvous(worker_group)
        self._patience = self._shutdown_timeout
        if self.meeting:
            names = {node.addr: rank for node, rank in self._nodes().items()}
            self.meeting.complete(names, worker_group.group_rank == 0)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result: RunResult = super()._monitor_workers(worker_group)
        if result.state != WorkerState.FAILED:
            return result
        code = exit_code(result.failures)
        if code == STOPPED and self._is_wanted_again():
            self._remaining_restarts += 1  # torch takes it away: this start is free
        elif code in (BAD_INPUT, STOPPED):
            self._remaining_restarts = 0
        elif self._remaining_restarts:
            left = self._remaining_restarts - 1
            say(f"{describe(result.failures)}; all ranks start again ({left} times more)")
        return result

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        everyone = True
        if worker_group.state == WorkerState.HEALTHY:  # a node has come, or another starts again
            assert self._store is not None
            self._store.set(RESTART, "1")
            everyone = len(self._nodes()) == worker_group.group_world_size
            if everyone:
                say("a node has come: the run is saved and starts again with it")
        else:
            everyone = False
        if not everyone:
            self._patience = min(HOPELESS, self._shutdown_timeout)
        super()._restart_workers(worker_group)

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        super()._shutdown(death_sig, self._patience)

    def _is_wanted_again(self) -> bool:
        assert self._store is not None
        with suppress(DistError):  # the node that serves the store has ended
            return self.meeting is not None and bool(self._store.check([RESTART]))
        return False

    @property
    def _handler(self) -> Any:
        return self._worker_group.spec.rdzv_handler

    def _nodes(self) -> Mapping[Any, int]:
        found: Mapping[Any, int] = self._handler._state_holder.state.participants
        return found


def worst(failures: Mapping[int, ProcessFailure]) -> tuple[int, int]:
    """The rank and exit code that say most about why ranks failed: those that lost another fail,
    too, and are then ended."""

    def place(item: tuple[int, ProcessFailure]) -> tuple[int, int]:
        code = item[1].exitcode
        ended = code == -signal.SIGTERM
        order = (
            code == BAD_INPUT,
            code == STOPPED,
            code < 0 and not ended,
            not ended,
        )
        return order.index(True) if any(order) else len(order), item[0]

    rank, failure = min(failures.items(), key=place)
    return rank, failure.exitcode


def exit_code(failures: Mapping[int, ProcessFailure]) -> int:
    """What this node ends with when its ranks do so: 128 + N after signal N, as in shells."""
    rank, code = worst(failures)
    if Agent.watcher and failures[rank].pid in Agent.watcher.ended:
        return 1  # as a rank that ends itself when it hangs
    return code if code >= 0 else 128 - code


def describe(failures: Mapping[int, ProcessFailure]) -> str:
    """Which rank failed first, and how."""
    rank, code = worst(failures)
    hung = Agent.watcher is not None and failures[rank].pid in Agent.watcher.ended
    where = f"rank {rank}" + (f" on {socket.gethostname()}" if Agent.meeting else "")
    if code >= 0:
        return f"{where} ended with exit code {code}"
    name = signal.Signals(-code).name
    why = " because it hung" if hung else " (often: out of memory)" if name == "SIGKILL" else ""
    return f"{where} was ended by {name}{why}"


def main(arguments: Sequence[str]) -> int:
    """torchrun with these arguments; returns the exit code: the ranks', 1 when nodes do not come
    together, 2 for settings under which they cannot."""
    logging.disable(logging.ERROR)  # what torch has to say is said below, in fewer words
    for name in SIGNALS:  # torch listens only while ranks run
        signal.signal(signal.Signals[name], _raise)
    args = run.parse_args(list(arguments))
    os.environ["HOURGLASS_AGENT"] = str(os.getpid())
    api.LocalElasticAgent = Agent
    try:
        with watching() as Agent.watcher:
            return attend(args)
    except ChildFailedError as error:
        code = exit_code(error.failures)
        if code not in (BAD_INPUT, STOPPED):
            say(describe(error.failures))
        return code
    except Apart as error:  # of one node: its own store is lost
        say(f"error: {error}")
        return 1
    except SignalException as error:  # the ranks had the signal, too, and time to save
        stopped = error.sigval in (signal.SIGTERM, signal.SIGUSR1)
        return STOPPED if stopped else 128 + error.sigval.value
    except ValueError as error:
        say(f"error: {error}")
        return BAD_INPUT


def _raise(number: int, _: FrameType | None) -> None:
    raise SignalException(f"signal {number}", signal.Signals(number))


def attend(args: Any) -> int:
    """Run torchrun; on several nodes, again when they have lost each other."""
    fewest, most = run.parse_min_max_nnodes(args.nnodes)
    interface = os.environ.get("NETWORK_INTERFACE")
    if most == 1:
        run.run(args)
        return 0
    args.local_addr = args.local_addr or own_address(interface)
    seconds = float(os.environ.get("JOIN_TIMEOUT", "600"))
    names = os.environ.get("NODE_NAMES", "").split()
    if args.rdzv_backend == "static":
        place = f"{args.master_addr}:{args.master_port}"
    else:
        place = args.rdzv_endpoint
    meeting = Meeting(place, (fewest, most), seconds, names)
    is_first = True
    while True:
        meeting.begin(is_first)
        try:
            return meet(args, meeting)
        except (TimeoutError, RendezvousError, DistError, Apart) as error:
            code = apart(error, meeting, args)
            if code is not None:
                return code
        is_first = False
        time.sleep(1)


def meet(args: Any, meeting: Meeting) -> int:
    """Wait for the place, and run torchrun there."""
    meeting.find(args.rdzv_id)
    left = max(1, round(meeting.left()))
    if args.rdzv_backend == "static":
        args.rdzv_conf = f"timeout={left}"
    else:
        Agent.meeting = meeting
        last_call = max(1, min(30, int(meeting.seconds / 2)))  # for more nodes than are needed
        where = f"is_host={int(meeting.serves)}"
        args.rdzv_conf = f"join_timeout={left},last_call_timeout={last_call},{where}"
    run.run(args)
    return 0


def apart(error: Exception, meeting: Meeting, args: Any) -> int | None:
    """The nodes have lost each other, or never met: the exit code; None to try again."""
    cause = error.__cause__ if isinstance(error, Apart) else error
    if isinstance(cause, (RendezvousClosedError, RendezvousGracefulExitError)):
        code = meeting.ended()
        say(f"the run has ended on another node, with exit code {code}")
        return code
    if isinstance(cause, TimeoutError):
        say(str(cause))
        return 1
    if args.rdzv_backend == "static":
        say(f"{meeting.place}: counted nodes do not meet, or have lost each other: {cause}")
        return 1
    is_timeout = isinstance(cause, RendezvousTimeoutError)
    if is_timeout or (not meeting.has_met and meeting.left() <= 0):
        say(f"{meeting.place}: {meeting.roll()} after {meeting.seconds:g} s: given up")
        return 1
    if meeting.has_met:
        if args.max_restarts <= 0:
            say(f"lost {meeting.place}, where nodes meet; no restarts are left")
            return 1
        args.max_restarts -= 1
        say(f"lost {meeting.place}, where nodes meet: waiting for {meeting.seconds:g} s at most")
    return None


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.exit(code if code in (DONE, BAD_INPUT) else int(os.environ.get("RETRY_EXIT_CODE", code)))
