"""``hourglass data prepare``: settings -> steps -> datasets and a report.

    OUT/settings.yaml inputs.json     the settings and inputs that the folder was started with
    OUT/work/                         unfinished work (workspace.py)
    OUT/NAME/                         the dataset of a source
    OUT/tokenizer/                    the tokenizer of all datasets
    OUT/report.json report.html quarantine.jsonl    written last

The same command continues where a killed run stopped, and reports a finished folder. With other
settings or inputs it is refused with the names of those that differ.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from data_tools.datasets.write import SPLITS, finish_dataset
from data_tools.live_line import Show, silent
from data_tools.pipeline.clean import Cleaner
from data_tools.pipeline.dry_run import plan
from data_tools.pipeline.executors import Executor, open_executor
from data_tools.pipeline.inputs import Inputs, changes, find
from data_tools.pipeline.progress import Progress
from data_tools.pipeline.read_step import QUARANTINE_FILE
from data_tools.pipeline.report import REPORT_FILE, Report, collect, write
from data_tools.pipeline.settings import Prepare
from data_tools.pipeline.steps import STEPS, Step, recipe_of, tokenizer_of
from data_tools.pipeline.workspace import Counts, Spec, Work, identity_of
from hourglass_dist.config.loader import differences, parse, to_yaml
from hourglass_dist.core.files import file_lock, new_folder, replace
from hourglass_dist.data.manifest import Shard

ATTEMPTS = 3
"""Number of times that a task is tried when its worker is killed."""
_SETTINGS, _INPUTS = "settings.yaml", "inputs.json"


def prepare(
    settings: Prepare, *, only: str | None = None, show: Show = silent, say: Show = silent
) -> Report | None:
    """Run all steps and return the report, or run ``only`` one step and return None.

    Raises ValueError, and keeps finished tasks for the next run, when an input is damaged, too many
    records are not text, no documents are left, a worker is killed ``ATTEMPTS`` times, or the
    folder was started with other settings or inputs.
    """
    out = Path(settings.out)
    inputs = find(settings)
    Cleaner(settings)  # raises now, not in an hour, when a model or package is missing
    out.mkdir(parents=True, exist_ok=True)
    with file_lock(out, busy=f"{out}: another process is preparing this folder"):
        _open(out, settings, inputs)
        if (out / REPORT_FILE).exists():
            say(f"{out}: already there")
            return Report.load(out)
        with ExitStack() as stack:
            pipeline = _Pipeline(out, settings, inputs, stack, show, say)
            for step in STEPS:
                pipeline.run(step, may_work=only in (None, step.name))
                if step.name == only:
                    return None
            pipeline.publish()
        report = collect(pipeline.work, pipeline.seconds)
        write(report, out)
        shutil.rmtree(out / "work")
        return report


def dry_run(settings: Prepare) -> list[str]:
    """Return lines on what would be done. Raises the ValueErrors of the start of ``prepare``."""
    inputs = find(settings)
    out = Path(settings.out)
    if out.exists():
        _require_the_same(out, settings, inputs)
    return plan(settings, inputs)


def _open(out: Path, settings: Prepare, inputs: Inputs) -> None:
    """Start a folder. Raises ValueError when it was started with other settings or inputs."""
    if not (out / _SETTINGS).exists() and not any(out.iterdir()):
        replace(out / _INPUTS, inputs.model_dump_json(indent=1))
        replace(out / _SETTINGS, to_yaml(settings.decisive()))
    _require_the_same(out, settings, inputs)
    (out / "work").mkdir(exist_ok=True)


def _require_the_same(out: Path, settings: Prepare, inputs: Inputs) -> None:
    if not (out / _SETTINGS).exists():
        if any(out.iterdir()):
            raise ValueError(f"{out}: already exists and was not made by 'hourglass data prepare'")
        return
    before = Work(out / "work").settings
    content = json.loads((out / _INPUTS).read_bytes())
    found = differences(before.decisive(), settings.decisive())
    found += changes(parse(Inputs, content, source=str(out / _INPUTS)), inputs)
    found = [line for line in found if not line.startswith("out: ")]
    if found:
        more = f"; and {len(found) - 5} more" if len(found) > 5 else ""
        raise ValueError(
            f"{out}: begun with other settings or inputs ({'; '.join(found[:5])}{more}); "
            "choose another folder (out) or remove it first"
        )


class _Pipeline:
    """The steps of a pipeline, which run one after another."""

    def __init__(
        self, out: Path, settings: Prepare, inputs: Inputs, stack: ExitStack, show: Show, say: Show
    ) -> None:
        self.out, self.work = out, Work((out / "work").absolute())
        self.seconds: dict[str, float] = {}
        self._settings, self._inputs = settings, inputs
        self._stack, self._show, self._say = stack, show, say
        self._executor: Executor | None = None
        self._identity = ""

    def run(self, step: Step, may_work: bool) -> None:
        """Run a step's remaining tasks. Raises ValueError for any without ``may_work``."""
        work, name = self.work, step.name
        work.begin(name, step.specs(work, self._inputs), self._identity)
        tasks = work.tasks(name)
        left = [i for i, task in enumerate(tasks) if work.done(name, i, task["key"]) is None]
        if left and not may_work:
            raise ValueError(
                f"--step: {name!r} has to be done first ({len(left)} of {len(tasks)} tasks left)"
            )
        begun = time.monotonic()
        progress = Progress(work, step.name, step.unit, tasks, len(left), self._show)
        for _ in range(ATTEMPTS):
            if left:
                self._workers().run(name, left, lambda: self._look(name, tasks, progress))
                self._require_no_error(name, tasks)
                left = [i for i in left if work.done(name, i, tasks[i]["key"]) is None]
        if left:
            raise ValueError(
                f"{describe(name, tasks[left[0]])}: its worker was killed {ATTEMPTS} times "
                "(out of memory?); run this again to go on from here"
            )
        counts = work.counts(name)
        self._identity = identity_of(tasks, counts)
        self.seconds[name] = time.monotonic() - begun
        if tasks:
            self._say(progress.summary(counts, self.seconds[name]))
        if name == "read":
            self._require_text(counts)
        if name == "tokens":
            self._require_documents(counts)

    def _workers(self) -> Executor:
        if self._executor is None:
            opened = open_executor(self._settings, self.work.root)
            self._executor = self._stack.enter_context(opened)
        return self._executor

    def _look(self, name: str, tasks: list[Spec], progress: Progress) -> None:
        self._require_no_error(name, tasks)
        progress.show()

    def _require_no_error(self, name: str, tasks: list[Spec]) -> None:
        for index, message in self.work.errors(name).items():
            raise ValueError(
                message if name == "read" else f"{describe(name, tasks[index])}: {message}"
            )

    def _require_text(self, counts: list[Counts]) -> None:
        records, quarantined = (sum(c[n] for c in counts) for n in ("records", "quarantined"))
        limit = self._settings.max_quarantined
        if quarantined > limit * records:
            with self._quarantine() as lines:
                first = json.loads(next(lines))
            path = self.out / QUARANTINE_FILE
            self._write_quarantine(path)
            where = f":{first['line']}" if first["line"] else f" at {first['position']}"
            raise ValueError(
                f"{quarantined:,} of {records:,} records are no text ({quarantined / records:.2%}, "
                f"max_quarantined is {limit:.2%}); all of them: {path}; the first: "
                f"{first['file']}{where}: {first['reason']}"
            )

    @contextmanager
    def _quarantine(self) -> Iterator[Iterator[str]]:
        folders = (self.work.folder("read", i) for i in range(len(self.work.tasks("read"))))
        yield (line for folder in folders for line in (folder / QUARANTINE_FILE).open())

    def _write_quarantine(self, path: Path) -> None:
        unfinished = path.with_name(f".{path.name}.unfinished")
        with self._quarantine() as lines, unfinished.open("w") as file:
            file.writelines(lines)
        unfinished.rename(path)

    def _require_documents(self, counts: list[Counts]) -> None:
        for source in self._settings.sources:
            if any(c["train"]["documents"] for c in counts if c["source"] == source.name):
                continue
            pairs = list(zip(self.work.counts("read"), counts, strict=True))
            mine = [(a, b) for a, b in pairs if b["source"] == source.name]
            dropped: dict[str, int] = {}
            for reasons in (r for a, b in mine for r in (a["dropped"], b["dropped"])):
                for reason, count in reasons.items():
                    dropped[reason] = dropped.get(reason, 0) + count
            why = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items()) or "none"
            records = sum(a["records"] for a, _ in mine)
            raise ValueError(
                f"source {source.name!r}: no document is left for training: "
                f"{records:,} records, dropped: {why}"
            )

    def publish(self) -> None:
        """Write the datasets, the tokenizer and the quarantine into ``out``."""
        work, tokenizer = self.work, tokenizer_of(self.work)
        entries = [parse(Shard, c, source="a shard of work/") for c in work.counts("shards")]
        made = list(zip(work.tasks("shards"), entries, strict=True))
        empty = dict.fromkeys((s.name for s in self._settings.sources), 0)
        for counts in work.counts("read"):
            empty[counts["source"]] += counts["dropped"].get("empty", 0)
        for source in empty:
            if (self.out / source).exists():  # by a run that was killed in the next lines
                shutil.rmtree(self.out / source)
            with new_folder(self.out / source) as folder:
                shards = []
                for split in SPLITS:
                    for index, (spec, shard) in enumerate(made):
                        if (spec["source"], spec["split"]) == (source, split):
                            for name in (shard.path, shard.table):
                                os.link(work.folder("shards", index) / name, folder / name)
                            shards.append(shard)
                finish_dataset(folder, shards, recipe_of(work, source), tokenizer, empty[source])
        shutil.rmtree(self.out / "tokenizer", ignore_errors=True)
        with new_folder(self.out / "tokenizer") as folder:
            tokenizer.save(folder)
        self._write_quarantine(self.out / QUARANTINE_FILE)


def describe(step: str, spec: Spec) -> str:
    """Return the name of a task for messages."""
    if step == "read":
        paths = [part[1]["path"] for part in spec["parts"]]
        return f"{paths[0]}" + (f" to {paths[-1]}" if len(paths) > 1 else "")
    details = [str(value) for name, value in spec.items() if name not in ("key", "of")]
    return f"step {' '.join([step, *details])}".strip()
