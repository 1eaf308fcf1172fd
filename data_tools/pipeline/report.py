"""The report of a pipeline, as JSON and HTML: every document that was read is accounted for."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_tools.pipeline.workspace import Work
from hourglass_dist.config.loader import to_yaml
from hourglass_dist.core.files import replace
from hourglass_dist.pages import html
from hourglass_dist.pages.html import Section
from hourglass_dist.pages.plots import COLOURS, as_svg, css, histogram_plot, number

REPORT_FILE, PAGE_FILE = "report.json", "report.html"
Numbers = dict[str, int]


@dataclass(frozen=True)
class Report:
    """The numbers of a finished pipeline."""

    documents: Numbers
    """Numbers of documents: read = kept + dropped + quarantined."""
    bytes: Numbers
    """Bytes of text read (without the quarantine) and kept."""
    dropped: Numbers
    """Numbers of dropped documents by reason, in the order of the stages."""
    sources: dict[str, Numbers]
    """Of every source: read, kept, dropped, quarantined, and per split documents, bytes, tokens."""
    groups: dict[str, Numbers]
    """Numbers of groups of exact and of near duplicates, by group size."""
    sizes: Numbers
    """Histogram of document sizes before filtering; keys: smallest size of a bin, bytes."""
    kept_sizes: Numbers
    """Histogram of the sizes of kept documents, with the same bins."""
    tokens_per_byte: Numbers
    """Histogram of kept documents; keys: smallest tokens per 4096 bytes of a bin."""
    vocab_size: int
    """Number of ids of the tokenizer."""
    samples: list[dict[str, Any]]
    """Up to 20 kept and up to 20 dropped documents, drawn at random."""
    seconds: dict[str, float]
    """Wall time of every stage in the run that finished it, seconds."""
    settings: str
    """Settings of the pipeline, as YAML."""

    @classmethod
    def load(cls, out: Path) -> Report:
        """Read report.json in ``out``."""
        return cls(**json.loads((out / REPORT_FILE).read_bytes()))

    def lines(self) -> list[str]:
        """Return the main numbers as lines of text."""
        counts = self.documents
        most = sorted(self.dropped.items(), key=lambda each: -each[1])
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in most)
        lines = [
            f"documents {counts['read']:,} = kept {counts['kept']:,} + dropped "
            f"{counts['dropped']:,} + quarantined {counts['quarantined']:,}"
        ]
        lines += [f"dropped   {reasons}"] if reasons else []
        for name, numbers in self.sources.items():
            splits = [
                f"{split} {numbers[f'{split}_tokens']:,} tokens ({numbers[f'{split}_bytes']:,} "
                f"bytes, {numbers[f'{split}_documents']:,} documents)"
                for split in ("train", "heldout")
            ]
            lines.append(f"{name:<9} {', '.join(splits)}")
        return lines


def _in_order(dropped: Numbers) -> Numbers:
    """Return the reasons in the order of the stages: sizes, language, rules, duplicates."""
    first = ["empty", "too short", "too long", "language"]
    last = ["exact duplicate", "near duplicate"]
    rules = sorted(set(dropped).difference(first, last))
    return {reason: dropped[reason] for reason in [*first, *rules, *last] if reason in dropped}


def _sum(tables: Iterable[Mapping[str, int]]) -> Numbers:
    total: Counter[str] = Counter()
    for table in tables:
        total.update(table)
    return dict(total)


def _sorted(table: Numbers) -> Numbers:
    return {name: table[name] for name in sorted(table, key=int)}


def collect(work: Work, seconds: dict[str, float]) -> Report:
    """Return the report: the sums of all tasks' counts."""
    read, tokens = work.counts("read"), work.counts("tokens")
    dropped = _in_order(_sum([c["dropped"] for c in read] + [c["dropped"] for c in tokens]))
    sources = {}
    for source in work.settings.sources:
        mine = [c for c in read if c["source"] == source.name]
        left = [c for c in tokens if c["source"] == source.name]
        lost = _sum([c["dropped"] for c in mine] + [c["dropped"] for c in left])
        numbers = {
            "read": sum(c["records"] for c in mine),
            "kept": sum(c["documents"] for c in left),
            "dropped": sum(lost.values()),
            "quarantined": sum(c["quarantined"] for c in mine),
        }
        for split in ("train", "heldout"):
            for name, key in (
                ("documents", "documents"),
                ("bytes", "text_bytes"),
                ("tokens", "tokens"),
            ):
                numbers[f"{split}_{name}"] = sum(c[split][key] for c in left)
        assert numbers["read"] == numbers["kept"] + numbers["dropped"] + numbers["quarantined"]
        sources[source.name] = numbers
    splits = [c[split] for c in tokens for split in ("train", "heldout")]
    return Report(
        documents={
            name: sum(numbers[name] for numbers in sources.values())
            for name in ("read", "kept", "dropped", "quarantined")
        },
        bytes={
            "read": sum(c["bytes"] for c in read),
            "kept": sum(c["text_bytes"] for c in splits),
        },
        dropped=dropped,
        sources=sources,
        groups={
            name: _sorted(_sum(c["groups"] for c in work.counts(stage)))
            for name, stage in (("exact", "exact"), ("near", "clusters"))
        },
        sizes=_sorted(_sum(c["sizes"] for c in read)),
        kept_sizes=_sorted(_sum(c["bytes"] for c in splits)),
        tokens_per_byte=_sorted(_sum(c["tokens_per_byte"] for c in splits)),
        vocab_size=work.counts("tokenizer")[0]["vocab_size"],
        samples=_samples(work),
        seconds={stage: round(value, 2) for stage, value in seconds.items()},
        settings=to_yaml(work.settings.decisive()),
    )


def _samples(work: Work) -> list[dict[str, Any]]:
    """Return up to 20 kept and 20 dropped documents, those with the smallest keys."""
    drawn = [
        sample
        for stage in ("read", "tokens")
        for index in range(len(work.tasks(stage)))
        for sample in json.loads((work.folder(stage, index) / "samples.json").read_bytes())
    ]
    files = json.loads((work.root.parent / "inputs.json").read_bytes())["files"]
    paths = {name: [file["path"] for file in files[name]] for name in files}
    chosen = []
    for kept in (True, False):
        some = sorted((s for s in drawn if (not s["reason"]) == kept), key=lambda s: s["key"])
        chosen += [s | {"file": paths[s["source"]][s["file"]]} for s in some[:20]]
    return chosen


# --- the page ------------------------------------------------------------------------------------


def write(report: Report, out: Path) -> None:
    """Write the page and, last, report.json."""
    replace(out / PAGE_FILE, page(report, out.name))
    replace(out / REPORT_FILE, json.dumps(asdict(report), indent=1) + "\n")


def page(report: Report, name: str) -> str:
    """Return the report as a page that needs no other file."""
    seconds = report.seconds
    sections = [
        Section("What was dropped", _funnel(report)),
        Section("Sources", _sources(report)),
        Section("Documents", html.grid(_histograms(report))),
        Section("Duplicates", _groups(report.groups)),
        Section("20 documents that were kept", _samples_of(report, kept=True), is_folded=True),
        Section("20 documents that were dropped", _samples_of(report, kept=False), is_folded=True),
        Section("Time", _bars(["step", "seconds"], seconds, ".1f"), is_folded=True),
        Section("Settings", html.preformatted(report.settings), is_folded=True),
    ]
    return html.page(name, report.lines()[0], _headline(report), sections)


def _headline(report: Report) -> str:
    counts = report.documents
    tokens = {
        split: sum(source[f"{split}_tokens"] for source in report.sources.values())
        for split in ("train", "heldout")
    }
    return html.cards(
        {
            "documents kept": f"{counts['kept'] / max(1, counts['read']):.1%}",
            "text kept": f"{report.bytes['kept'] / max(1, report.bytes['read']):.1%}",
            "bytes of text": number(report.bytes["kept"]),
            "training tokens": number(tokens["train"]),
            "held-out tokens": number(tokens["heldout"]),
            "ids of the tokenizer": f"{report.vocab_size:,}",
        }
    )


def _funnel(report: Report) -> str:
    """Return a table of the documents that each reason dropped, and of those left after it."""
    read = left = report.documents["read"]
    rows, shares = [["read", "", f"{read:,}"]], [1.0]
    for reason, count in {"quarantined": report.documents["quarantined"], **report.dropped}.items():
        left -= count
        rows.append([reason, f"{count:,}", f"{left:,}"])
        shares.append(left / max(1, read))
    return html.table(["reason", "dropped", "documents left"], rows, shares)


def _sources(report: Report) -> str:
    names = ("read", "kept", "dropped", "quarantined", "train_tokens", "heldout_tokens")
    rows = [[name, *(f"{s[each]:,}" for each in names)] for name, s in report.sources.items()]
    whole = max(1, sum(s["train_tokens"] for s in report.sources.values()))
    shares = [s["train_tokens"] / whole for s in report.sources.values()]
    head = ["source", *names[:4], "training tokens", "held-out tokens"]
    return html.table(head, rows, shares if len(rows) > 1 else None)


def _histograms(report: Report) -> list[str]:
    sizes = histogram_plot("bytes", {"read": report.sizes, "kept": report.kept_sizes})
    ratio = histogram_plot("tokens per byte", {"kept": report.tokens_per_byte}, scale=1 / 4096)
    legend = {"read": (css(COLOURS[-1]), ""), "kept": (css(COLOURS[0]), "")}
    return [
        html.figure("Size of documents", "", as_svg(sizes, "Size of documents"), legend),
        html.figure("Tokens per byte", "kept documents", as_svg(ratio, "Tokens per byte"), {}),
    ]


def _groups(groups: dict[str, Numbers]) -> str:
    """Return a table of the numbers of groups of duplicates, by kind and size."""
    counts: Counter[str] = Counter()
    for kind, sizes in groups.items():
        for size, count in sizes.items():
            at_most = size if int(size) < 5 else "5 to 9" if int(size) < 10 else "10 or more"
            counts[f"{kind}, {at_most} documents"] += count
    return _bars(["duplicates", "groups"], counts, ",")


def _bars(head: list[str], values: Mapping[str, float], form: str) -> str:
    most = max([*values.values(), 1e-9])
    rows = [[name, format(value, form)] for name, value in values.items()]
    return html.table(head, rows, [value / most for value in values.values()])


def _samples_of(report: Report, kept: bool) -> str:
    shown = [sample for sample in report.samples if (not sample["reason"]) == kept]
    return html.grid([html.quotation(_about(sample), sample["text"]) for sample in shown], "texts")


def _about(sample: dict[str, Any]) -> str:
    reason = f"{sample['reason']}; " if sample["reason"] else ""
    where = f"{sample['source']}: {sample['file']} at {sample['position']:,}"
    return f"{reason}{sample['characters']:,} characters; {where}"
