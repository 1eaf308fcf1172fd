"""Report of a run as one self-contained HTML page: no network, no scripts, all text escaped.

It is made from the run folder, also while the run is in progress. ``config.yaml`` and
``metrics.jsonl`` are required; ``history.jsonl``, ``skipped.jsonl``, ``samples.jsonl``,
``positions.jsonl`` and ``profile/table.txt`` are optional.
"""

from __future__ import annotations

from collections import defaultdict
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from hourglass_dist.config.loader import Section as SettingsSection
from hourglass_dist.config.model import INHERITED, LevelSection, ModelSection
from hourglass_dist.config.schema import Config
from hourglass_dist.core.files import replace
from hourglass_dist.core.text import show_duration
from hourglass_dist.pages import html, plots
from hourglass_dist.pages.html import Section
from hourglass_dist.pages.plots import number
from hourglass_dist.planning.plan import Plan, plan
from hourglass_dist.planning.render import describe
from hourglass_dist.report.curves import INSIDE, LEARNING, SPEED, Chart, curves, draw, positions
from hourglass_dist.report.diagram import label, stacks
from hourglass_dist.report.run import Run, read_run

MOST_SKIPPED, MOST_PROMPTS, MOST_PROMPT_CHARACTERS = 30, 4, 240


def write_report(run: Path, out: Path) -> None:
    """Write the report of the run folder ``run`` to ``out``. Raises ValueError as ``read_run``."""
    replace(out, page(read_run(run)))


def page(run: Run) -> str:
    """Return the report as HTML."""
    last: dict[str, Any] = run.starts[-1] if run.starts else {"ranks": 1, "device": "cpu"}
    made = plan(run.config, int(last["ranks"]), "cpu" if last["device"] == "cpu" else "cuda")
    speed = curves(run, SPEED)
    speed += f"<h3>Where the time goes</h3>{html.preformatted(run.profile)}" * bool(run.profile)
    sections = [
        Section("Learning", curves(run, LEARNING)),
        Section("Samples", samples(run)),
        Section("Held-out score by place in a bucket", positions(run)),
        Section("Inside the model", curves(run, INSIDE), is_folded=True),
        Section("Speed and memory", speed, is_folded=True),
        Section("Starts", starts(run), is_folded=True),
        Section("Skipped steps", skipped(run), is_folded=True),
        Section("Plan", planned(made), is_folded=True),
        Section("Settings", settings(run.config), is_folded=True),
    ]
    return html.page(run.path.resolve().name, state(run), top(run, made), sections)


# --- the top -------------------------------------------------------------------------------------


def top(run: Run, made: Plan) -> str:
    """Return the top of the page: the score with its curve, the key figures, and the model."""
    chart = Chart("Bits per byte", ("heldout/bits_per_byte", "train/bits_per_byte"))
    curve = draw(run, chart, {"broad": plots.BROAD, "slim": plots.SLIM})
    figures = html.cards(headline(run, made))
    beside = f"<div>{figures}{picture(run.config)}</div>"
    return f'<div class="top"><div>{score(run)}{curve}</div>{beside}</div>'


def score(run: Run) -> str:
    """Return the newest held-out score in large type, and the best one where it differs."""
    held_out = run.metrics.get("heldout/bits_per_byte")
    if not held_out:
        return ""
    (step, newest), (best_step, best) = held_out[-1], min(held_out, key=lambda each: each[1])
    also = f"best: {best:.4f} at step {best_step:,}" if best < newest else "the best so far"
    text = f"held-out bits per byte at step {step:,}; {also}"
    return f'<p class="score"><b>{newest:.4f}</b>{escape(text)}</p>'


def headline(run: Run, made: Plan) -> dict[str, str | None]:
    """Return the key figures by name; None is unknown."""
    config, step = run.config, run.step
    restarts = max(0, len(run.starts) - 1)

    def shown(name: str, form: str = "") -> str | None:
        value = run.last(name)
        return None if value is None else format(value, form) if form else number(value)

    return {
        "steps": f"{step:,} of {config.train.steps:,}",
        "tokens": number(config.data.tokens(step)),
        "parameters": number(made.parameters.total),
        "tokens per second": shown("train/tokens_per_second"),
        "share of peak FLOP/s": shown("train/mfu", ".1%"),
        "goodput": shown("train/goodput", ".1%"),
        "restarts": str(restarts) if restarts else None,
        "skipped steps": str(len(run.skipped)) if run.skipped else None,
    }


def state(run: Run) -> str:
    """Return the state, such as ``4@1 8@3 4@1, 8 x NVIDIA H100, bf16, ZeRO-2: finished``."""
    config = run.config
    where = f"{run.starts[-1]['ranks']} x {run.starts[-1]['device']}, " if run.starts else ""
    about = (
        f"{config.model.hierarchy}, {where}{config.train.precision}, ZeRO-{config.deepspeed.stage}"
    )
    if not run.history:
        return about
    last = run.history[-1]
    ending = last["reason"] if last["event"] == "end" else "running, or killed: no end is noted"
    return f"{about}: {ending}"


def picture(config: Config) -> str:
    """Return the diagram of the model: a bar for each stack of layers, as long as its sequence."""
    rows = [
        f'<p><i><b style="width:{100 / stack.stride:.2f}%;background:var(--c{stack.level % 7})">'
        f"</b></i><span>{escape(label(stack))}</span></p>"
        for stack in stacks(config.model)
    ]
    return f'<div class="hourglass">{"".join(rows)}</div>'


# --- texts and tables ----------------------------------------------------------------------------


def samples(run: Run) -> str:
    """Return the first, middle and last continuation of each prompt, side by side."""
    by_prompt: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for sample in run.samples:
        by_prompt[str(sample["prompt"])].append(sample)
    blocks = []
    for prompt, written in list(by_prompt.items())[:MOST_PROMPTS]:
        begin, rest = cut_at_word(prompt)
        columns = [
            html.quotation(
                f"step {int(each['step']):,}", rest + str(each["text"]).removeprefix(prompt)
            )
            for each in (written[n] for n in sorted({0, len(written) // 2, len(written) - 1}))
        ]
        blocks.append(f"<h3>{escape(begin)}</h3>" + html.grid(columns, "texts"))
    return "".join(blocks)


def cut_at_word(prompt: str) -> tuple[str, str]:
    """Return the whole words of a prompt (of a long one the last words), and the part of a word at
    its end, which the model completes."""
    words = prompt.rstrip()
    rest = ""
    if words == prompt and len(parts := prompt.rsplit(None, 1)) == 2:
        words, rest = parts
    if len(words) > MOST_PROMPT_CHARACTERS:
        words = "… " + words[-MOST_PROMPT_CHARACTERS:].split(None, 1)[-1]
    return words, rest


def starts(run: Run) -> str:
    """Return a table of the starts of the run: time, machines, versions and how each ended."""
    rows = []
    for index, entry in enumerate(run.history):
        if entry["event"] != "start":
            continue
        after = run.history[index + 1] if index + 1 < len(run.history) else None
        end = after if after and after["event"] == "end" else None
        begun = datetime.fromtimestamp(entry["time"], UTC)
        rows.append(
            [
                begun.strftime("%Y-%m-%d %H:%M:%S"),
                f"{entry['step']:,}",
                f"{end['step']:,}" if end else "",
                show_duration(end["time"] - entry["time"]) if end else "",
                end["reason"] if end else ("killed" if after else "no end noted"),
                f"{entry['ranks']} x {entry['device']} ({entry['host']})",
                ", ".join(f"{name} {text}" for name, text in entry["versions"].items()),
                entry["revision"] or "",
            ]
        )
    head = ["start (UTC)", "from step", "to step", "time", "end", "ranks", "versions", "revision"]
    return html.short_table(head, rows)


def skipped(run: Run) -> str:
    """Return a table of the newest steps whose loss or gradient was NaN or infinite."""
    rows = [
        [f"{entry['step']:,}", str(entry.get("loss", "")), " to ".join(map(str, entry["rows"]))]
        for entry in run.skipped[-MOST_SKIPPED:]
    ]
    more = len(run.skipped) - len(rows)
    note = html.paragraph(f"{more:,} earlier ones are not listed.") if more else ""
    return html.table(["step", "loss", "rows of the data"], rows) + note


def planned(made: Plan) -> str:
    """Return the plan as HTML paragraphs and tables."""
    parts = []
    for part in describe(made):
        if isinstance(part, Table):
            rows = zip(*(map(str, column.cells) for column in part.columns), strict=True)
            head = [str(column.header) for column in part.columns]
            parts.append(html.table(head, [list(row) for row in rows]))
        else:
            parts += map(html.paragraph, part.splitlines())
    return "".join(parts)


def settings(config: Config) -> str:
    """Return a table of the settings that differ from their defaults."""
    rows = [[path, value] for path, value in changed_settings(config).items()]
    note = html.paragraph("What differs from the defaults; config.yaml has all settings.")
    return note + html.table(["setting", "value"], rows)


def changed_settings(config: Config) -> dict[str, str]:
    """Return the settings that differ from their defaults, as YAML by the path of the setting."""
    written = config.model_dump(mode="json", exclude_defaults=True)
    model = written["model"]
    usual = defaults(LevelSection) | {key: model[key] for key in INHERITED}
    levels = [
        without(level, usual | {"dim_head": model["dim_head"] or level["dim"] // level["heads"]})
        for level in model.pop("levels")
    ]
    written["model"] = without(model, defaults(ModelSection)) | {"levels": levels}
    rows: dict[str, str] = {}

    def add(path: str, value: Any) -> None:
        pairs: Any = value.items() if isinstance(value, dict) else ()
        if path.endswith("levels"):
            pairs = enumerate(value)
        for key, inner in pairs:
            add(f"{path}.{key}" if path else str(key), inner)
        if not pairs:
            text = yaml.safe_dump(value, default_flow_style=True, width=10_000)
            rows[path] = text.removesuffix("...\n").strip()

    add("", written)
    return rows


def defaults(section: type[SettingsSection]) -> dict[str, Any]:
    """Return the defaults of a section, by the name of the setting."""
    fields = section.model_fields.items()
    return {
        key: field.get_default(call_default_factory=True)
        for key, field in fields
        if not field.is_required()
    }


def without(settings: dict[str, Any], usual: dict[str, Any]) -> dict[str, Any]:
    """Return the settings whose value differs from that in ``usual``."""
    return {key: value for key, value in settings.items() if usual.get(key, ...) != value}
