"""torchrun's agent, the process on each node that starts the ranks and monitors them.

It subclasses torch's agent and handles these events differently:

    a rank exits with 2 or 75    torch restarts it; here the run ends with that exit code
    a node joins                 ranks save and exit with 75 on all nodes, and restart with it
    the store is lost            the node that serves it is down: the others wait for a new store
    a node does not join         one line names the nodes that are there and those that are missing
    a rank dies beside others    the others have seconds to end, not the minutes of saving
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
"""Seconds that ranks have to end when other ranks are gone: they can no longer save."""
RESTART = "hourglass/restart"
"""Key in the store of one round, set when nodes join or leave: ranks that exit with 75 restart."""


class Apart(SignalException):
    """Error: the nodes lost each other or never met; ``__cause__`` is the reason. A SignalException
    because torch closes the rendezvous for all nodes after any other exception."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(str(cause), signal.SIGTERM)
        self.__cause__ = cause


class Agent(LocalElasticAgent):
    """torch's agent with the event handling of this file's table."""

    meeting: Meeting | None = None
    """Rendezvous of the nodes; None with one node or with the static rendezvous backend."""
    watcher: Watcher | None = None
    """Watcher of this node's ranks, which ends those that hang."""

    def __init__(self, spec: WorkerSpec, *args: Any, **kwargs: Any) -> None:
        super().__init__(spec, *args, **kwargs)
        self._patience = self._shutdown_timeout
        if self.meeting:
            self.meeting.watch(spec.rdzv_handler)

    def run(self, role: str = DEFAULT_ROLE) -> RunResult:
        """Run the ranks until the run has ended on all nodes, and return their result."""
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
    """Return the rank and exit code of the likeliest cause: ranks that lose another one fail as
    well, and are then ended."""

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
    """Return this node's exit code for these failures: 128 + N after signal N, as in shells."""
    rank, code = worst(failures)
    if Agent.watcher and failures[rank].pid in Agent.watcher.ended:
        return 1  # as a rank that ends itself when it hangs
    return code if code >= 0 else 128 - code


def describe(failures: Mapping[int, ProcessFailure]) -> str:
    """Return one line that names the rank of ``worst`` and how it ended."""
    rank, code = worst(failures)
    hung = Agent.watcher is not None and failures[rank].pid in Agent.watcher.ended
    where = f"rank {rank}" + (f" on {socket.gethostname()}" if Agent.meeting else "")
    if code >= 0:
        return f"{where} ended with exit code {code}"
    name = signal.Signals(-code).name
    why = " because it hung" if hung else " (often: out of memory)" if name == "SIGKILL" else ""
    return f"{where} was ended by {name}{why}"


def main(arguments: Sequence[str]) -> int:
    """Run torchrun with these arguments and return the exit code: that of the ranks, 1 when nodes
    do not meet, 2 for settings under which they cannot."""
    logging.disable(logging.ERROR)  # torch's messages are replaced by the shorter ones below
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
    except Apart as error:  # on a single node: its own store is lost
        say(f"error: {error}")
        return 1
    except SignalException as error:  # the ranks got the signal too, and had time to save
        stopped = error.sigval in (signal.SIGTERM, signal.SIGUSR1)
        return STOPPED if stopped else 128 + error.sigval.value
    except ValueError as error:
        say(f"error: {error}")
        return BAD_INPUT


def _raise(number: int, _: FrameType | None) -> None:
    raise SignalException(f"signal {number}", signal.Signals(number))


def attend(args: Any) -> int:
    """Run torchrun, again when several nodes lost each other, and return the exit code."""
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
    """Wait until the rendezvous endpoint can be reached, run torchrun with it and return 0."""
    meeting.find(args.rdzv_id)
    left = max(1, round(meeting.left()))
    if args.rdzv_backend == "static":
        args.rdzv_conf = f"timeout={left}"
    else:
        Agent.meeting = meeting
        last_call = max(1, min(30, int(meeting.seconds / 2)))  # wait for more than the fewest nodes
        where = f"is_host={int(meeting.serves)}"
        args.rdzv_conf = f"join_timeout={left},last_call_timeout={last_call},{where}"
    run.run(args)
    return 0


def apart(error: Exception, meeting: Meeting, args: Any) -> int | None:
    """Return the exit code after nodes lost each other or never met; None to try again."""
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
