"""Status of a run, from the files in its folder alone: ``hourglass status RUN``.

    running    no rank has been silent for longer than its limit
    finished   all steps are done
    stopped    ended on request; the same command continues it
    crashed    ended by an error or a kill, or its ranks are gone
    hanging    ranks have been silent for longer than their limit

It works wherever the folder can be read, during the run and after. A sign of life is a file of
``heartbeat.py``; on a rank's own host its process is checked, too.
"""

from __future__ import annotations

import io
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hourglass_dist.config.schema import Config, load
from hourglass_dist.core import exit_codes
from hourglass_dist.core.records import KILLED, Start, read_history, read_jsonl, starts_of
from hourglass_dist.core.text import show_duration
from hourglass_dist.health.heartbeat import (
    Heartbeat,
    pause_between,
    process_space,
    process_state,
    read_heartbeats,
)
from hourglass_dist.health.stragglers import straggler

EXIT_CODES = {
    "running": exit_codes.DONE,
    "finished": exit_codes.DONE,
    "stopped": exit_codes.STOPPED,
    "crashed": exit_codes.FAILED,
    "hanging": exit_codes.FAILED,
}
WIDTH = 100


@dataclass(frozen=True)
class Status:
    """Status of a run; None is unknown."""

    run: str
    state: str
    why: str
    """Reason for the state; may be empty."""
    step: int
    steps: int
    doing: str | None
    loss: float | None
    bits_per_byte: float | None
    heldout_bits_per_byte: float | None
    tokens_per_second: float | None
    goodput: float | None
    seconds_left: float | None
    ranks: int | None
    hosts: list[str]
    last_sign_seconds: float | None
    """Seconds since the last sign of life of any rank."""
    silent: list[str]
    """Ranks whose last sign of life is much older than the newest, or that are stopped or gone."""
    rank_seconds: list[float] | None
    """Minimum, median and maximum of the own time of ranks per step, without waiting, seconds."""
    slowest_rank: str | None
    straggler: str | None
    """Rank that has been much slower than the others in several records in a row."""
    checkpoint_step: int | None
    checkpoint_age_seconds: float | None
    starts: int
    last_ending: str | None
    """Reason for the end of the newest start that has ended."""
    skipped_steps: int

    @property
    def exit_code(self) -> int:
        """Exit code of ``hourglass status``."""
        return EXIT_CODES[self.state]


def read_status(run: Path) -> Status:
    """Read the status of a run. Raises ValueError when ``run`` is not a run folder."""
    if not (run / "config.yaml").exists():
        raise ValueError(f"{run}: expected a run folder (with config.yaml), found none")
    config, now = load(run / "config.yaml"), time.time()
    records, starts = read_jsonl(run / "metrics.jsonl"), starts_of(history := read_history(run))
    beats = read_heartbeats(run)
    if history and history[-1]["event"] == "end":  # ignore files of an earlier start
        beats = [beat for beat in beats if beat.time > history[-1]["time"]]
    state, why = find_state(run, starts, beats, now)
    trained = [record for record in records if "train/loss" in record]
    last = trained[-1] if trained else {}
    noted = (int(entry["step"]) for entry in (last, *history[-1:]) if entry)
    step = max([0, *noted, *(beat.step for beat in beats)])
    scores = [r["heldout/bits_per_byte"] for r in records if "heldout/bits_per_byte" in r]
    hosts = {beat.rank: beat.host for beat in beats}
    over = [start for start in starts if start.ending or start is not starts[-1]]
    return Status(
        run=str(run),
        state=state,
        why=why,
        step=step,
        steps=config.train.steps,
        doing=beats[0].doing if beats else None,
        loss=last.get("train/loss"),
        bits_per_byte=last.get("train/bits_per_byte"),
        heldout_bits_per_byte=scores[-1] if scores else None,
        tokens_per_second=last.get("train/tokens_per_second"),
        goodput=last.get("train/goodput"),
        seconds_left=seconds_left(config, step, last) if state == "running" else None,
        ranks=beats[0].ranks
        if beats
        else next((e["ranks"] for e in history[::-1] if "ranks" in e), None),
        hosts=sorted(set(hosts.values())),
        last_sign_seconds=now - max(beat.time for beat in beats) if beats else None,
        silent=silent_ranks(beats, now),
        skipped_steps=len(read_jsonl(run / "skipped.jsonl")),
        starts=len(starts),
        last_ending=(over[-1].ending or KILLED) if over else None,
        **_speeds(trained, hosts),
        **_checkpoint(run, now),
    )


def find_state(
    run: Path, starts: Sequence[Start], beats: Sequence[Heartbeat], now: float
) -> tuple[str, str]:
    """Return the state of a run (one of the five above) and the reason for it."""
    if not beats:
        if not starts:
            return "crashed", "it ended before its first step"
        start = starts[-1]
        if start.ending is None:
            return "crashed", KILLED
        if start.ending == "finished":
            return "finished", ""
        return ("stopped" if start.ending.startswith("stopped by ") else "crashed"), start.ending
    gone = [beat for beat in beats if _here(beat) and process_state(beat.pid) is None]
    if len(gone) == len(beats):
        return "crashed", "its processes are gone"
    late = [b for b in beats if now - b.time > b.limit + pause_between(b.ranks)]
    if not late:
        return "running", beats[0].doing
    ages = [now - beat.time for beat in beats]
    if min(ages) > 2 * max(beat.limit for beat in beats):  # long enough to have been ended
        return "crashed", f"no rank has given a sign of life for {show_duration(min(ages))}"
    return "hanging", f"silent for longer than {show_duration(late[0].limit)}: {_names(late)}"


def silent_ranks(beats: Sequence[Heartbeat], now: float) -> list[str]:
    """Return the ranks that are gone, stopped or silent, each with the reason."""
    lines = []
    newest = max((beat.time for beat in beats), default=0.0)
    for beat in beats:
        state = process_state(beat.pid) if _here(beat) else ("", 0)
        if state is None:
            lines.append(f"{beat.where}: gone")
        elif state[0] in ("T", "t"):
            lines.append(f"{beat.where}: stopped by a signal")
        elif newest - beat.time > 3 * pause_between(beat.ranks) + 2 * (beat.seconds or 0):
            lines.append(f"{beat.where}: last sign {show_duration(now - beat.time)} ago")
    return lines


def _here(beat: Heartbeat) -> bool:
    """Return whether the process of a rank is on this host and in this process namespace."""
    return beat.host == socket.gethostname() and beat.space == process_space() != ""


def _names(beats: Sequence[Heartbeat]) -> str:
    more = f" and {len(beats) - 4} more" if len(beats) > 4 else ""
    return ", ".join(beat.where for beat in beats[:4]) + more


def seconds_left(config: Config, step: int, last: Mapping[str, Any]) -> float | None:
    """Return the seconds until the last step, without evaluations; None if the speed is unknown."""
    tokens = config.data.tokens(config.train.steps) - config.data.tokens(step)
    speed = last.get("train/tokens_per_second")
    return tokens / speed if speed else None


def _speeds(trained: Sequence[Mapping[str, Any]], hosts: Mapping[int, str]) -> dict[str, Any]:
    """Return ``rank_seconds``, ``slowest_rank`` and ``straggler`` of a Status."""

    def name(rank: int) -> str:
        return f"rank {rank} ({hosts[rank]})" if rank in hosts else f"rank {rank}"

    seconds, slowest, slow = None, None, None
    if trained and "train/slowest_rank" in trained[-1]:
        seconds = [trained[-1][f"ranks/seconds_{which}"] for which in ("min", "median", "max")]
        slowest = name(int(trained[-1]["train/slowest_rank"]))
    if (slowest_one := straggler(trained)) is not None:
        rank, ratio = slowest_one
        slow = f"{name(rank)}, {ratio:.1f} times as long as the others"
    return {"rank_seconds": seconds, "slowest_rank": slowest, "straggler": slow}


def _checkpoint(run: Path, now: float) -> dict[str, Any]:
    """Return the step and the age in seconds of the newest checkpoint; None without one."""
    with suppress(OSError, ValueError):
        name = (run / "checkpoints" / "latest").read_text().strip()
        written = (run / "checkpoints" / name / "manifest.json").stat().st_mtime
        step = int(name.removeprefix("step_"))
        return {"checkpoint_step": step, "checkpoint_age_seconds": now - written}
    return {"checkpoint_step": None, "checkpoint_age_seconds": None}


def as_json(status: Status) -> dict[str, Any]:
    """Return all fields and the exit code, for JSON."""
    return asdict(status) | {"exit_code": status.exit_code}


COLOURS = {"running": "green", "finished": "green", "stopped": "yellow"}


def render(status: Status, terminal: bool = False) -> str:
    """Return the status as text of at most 100 columns, with colours on a terminal."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True, min_width=12)
    table.add_column(overflow="fold")
    for name, text in _rows(status):
        table.add_row(name, Text(text))
    out = io.StringIO()
    console = Console(file=out, width=WIDTH, force_terminal=terminal, highlight=False)
    colour = COLOURS.get(status.state, "red")
    why = f": {status.why}" if status.why else ""
    console.print(Text.assemble((status.run, "bold"), "  ", (status.state, colour), why))
    console.print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def _rows(status: Status) -> list[tuple[str, str]]:
    """Return name and text of every line of the table; unknown values have no line."""
    rows = [("step", _progress(status))]
    if status.loss is not None:
        score = f"{status.loss:.4f} nats/token, {status.bits_per_byte or 0:.4f} bits/byte"
        held = status.heldout_bits_per_byte
        rows.append(("loss", score + (f"; held out {held:.4f} bits/byte" if held else "")))
    if status.tokens_per_second is not None:
        goodput = f"; goodput {status.goodput:.0%}" if status.goodput is not None else ""
        rows.append(("speed", f"{status.tokens_per_second:,.0f} tokens/s{goodput}"))
    if status.ranks is not None:
        sign = status.last_sign_seconds
        some = f" and {len(status.hosts) - 3} more" if len(status.hosts) > 3 else ""
        hosts = f" on {', '.join(status.hosts[:3])}{some}" if status.hosts else ""
        ago = f"; last sign of life {show_duration(sign)} ago" if sign is not None else ""
        rows.append(("ranks", f"{status.ranks}{hosts}{ago}"))
    rows += [("silent", line) for line in status.silent[:8]]
    if len(status.silent) > 8:
        rows.append(("", f"and {len(status.silent) - 8} more"))
    if status.rank_seconds is not None:
        least, median, most = (f"{seconds:.3g}" for seconds in status.rank_seconds)
        text = f"{least} to {most} s a step for itself, median {median}; {status.slowest_rank} most"
        rows.append(("each rank", text))
    if status.straggler is not None:
        rows.append(("slow", status.straggler))
    age = status.checkpoint_age_seconds
    saved = "none"
    if age is not None:
        saved = f"step {status.checkpoint_step:,}, {show_duration(age)} ago"
    rows.append(("checkpoint", saved))
    before = f"; the last one that ended: {status.last_ending}" if status.last_ending else ""
    rows.append(("starts", f"{status.starts}{before}"))
    if status.skipped_steps:
        rows.append(("skipped", f"{status.skipped_steps} steps with a NaN or infinite loss"))
    return rows


def _progress(status: Status) -> str:
    left = f", {show_duration(status.seconds_left)} left" if status.seconds_left is not None else ""
    share = status.step / status.steps
    return f"{status.step:,} of {status.steps:,} ({share:.0%}){left}"
