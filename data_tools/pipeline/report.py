"""What a pipeline did, as JSON and as a page: every document that came in is accounted for."""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_tools.datasets.plots import as_image, bars, histogram_plot
from data_tools.pipeline.workspace import Work
from hourglass_dist.config.loader import to_yaml
from hourglass_dist.core.files import replace

REPORT_FILE, PAGE_FILE = "report.json", "report.html"
Numbers = dict[str, int]


@dataclass(frozen=True)
class Report:
    """The numbers of a finished pipeline."""

    documents: Numbers
    """read, kept, dropped and quarantined: the first is the sum of the others."""
    bytes: Numbers
    """Of text: read (without the quarantine) and kept."""
    dropped: Numbers
    """Documents by reason, in the order of the stages."""
    sources: dict[str, Numbers]
    """Of every source: read, kept, dropped, quarantined, and per split documents, bytes, tokens."""
    groups: dict[str, Numbers]
    """Groups of exact and of near duplicates, by their size."""
    sizes: Numbers
    """Documents by the smallest size in bytes of their bin, before filtering."""
    kept_sizes: Numbers
    """The same of what was kept."""
    tokens_per_byte: Numbers
    """Kept documents by tokens in 4096 bytes, the smallest of their bin."""
    vocab_size: int
    """Ids of the tokenizer."""
    samples: list[dict[str, Any]]
    """20 documents that were kept and 20 that were dropped, drawn at random."""
    seconds: dict[str, float]
    """Wall time of every stage in the run that finished it."""
    settings: str
    """The settings, as YAML."""

    @classmethod
    def load(cls, out: Path) -> Report:
        """Read report.json."""
        return cls(**json.loads((out / REPORT_FILE).read_bytes()))

    def lines(self) -> list[str]:
        """The numbers that everybody wants to see."""
        counts = self.documents
        most = sorted(self.dropped.items(), key=lambda each: -each[1])
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in most)
        found = [
            f"documents {counts['read']:,} = kept {counts['kept']:,} + dropped "
            f"{counts['dropped']:,} + quarantined {counts['quarantined']:,}"
        ]
        found += [f"dropped   {reasons}"] if reasons else []
        for name, numbers in self.sources.items():
            splits = [
                f"{split} {numbers[f'{split}_tokens']:,} tokens ({numbers[f'{split}_bytes']:,} "
                f"bytes, {numbers[f'{split}_documents']:,} documents)"
                for split in ("train", "heldout")
            ]
            found.append(f"{name:<9} {', '.join(splits)}")
        return found


def _in_order(dropped: Numbers) -> Numbers:
    """As documents meet the reasons: sizes, language, rules, duplicates."""
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
    """Add up what all tasks counted."""
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
    """The 20 with the smallest keys, of those that were kept and of those dropped."""
    found = [
        sample
        for stage in ("read", "tokens")
        for index in range(len(work.tasks(stage)))
        for sample in json.loads((work.folder(stage, index) / "samples.json").read_bytes())
    ]
    files = json.loads((work.root.parent / "inputs.json").read_bytes())["files"]
    paths = {name: [file["path"] for file in files[name]] for name in files}
    chosen = []
    for kept in (True, False):
        some = sorted((s for s in found if (not s["reason"]) == kept), key=lambda s: s["key"])
        chosen += [s | {"file": paths[s["source"]][s["file"]]} for s in some[:20]]
    return chosen


# --- the page ------------------------------------------------------------------------------------

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem;
       color: #1d2330; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; } td, th { padding: .2rem .9rem .2rem 0; text-align: right; }
td:first-child, th:first-child { text-align: left; }
th { border-bottom: 1px solid #b9c0cc; font-weight: 600; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(30rem, 1fr)); gap: 1rem; }
img { max-width: 100%; }
pre { background: #f4f6f9; padding: .7rem; white-space: pre-wrap; overflow-wrap: anywhere;
      font-size: 12px; margin: .2rem 0 1rem; max-height: 16rem; overflow: auto; }
.where { color: #5a6475; font-size: 12px; }
"""


def write(report: Report, out: Path) -> None:
    """Write the page and, last, report.json."""
    replace(out / PAGE_FILE, page(report, out.name))
    replace(out / REPORT_FILE, json.dumps(asdict(report), indent=1) + "\n")


def page(report: Report, name: str) -> str:
    """The report as a page that needs no other file."""
    counts = report.documents
    funnel = {"read": counts["read"]}
    left = counts["read"] - counts["quarantined"]
    funnel |= {"text": left}
    for reason, count in report.dropped.items():
        left -= count
        funnel[f"after {reason}"] = left
    plots = [
        bars("Documents left after each reason", funnel),
        bars("Tokens by source", {n: s["train_tokens"] for n, s in report.sources.items()}),
        histogram_plot(
            "Size of documents", "bytes",
            {"read": report.sizes, "kept": report.kept_sizes},
        ),
        histogram_plot(
            "Tokens per byte of kept documents", "tokens per byte",
            {"kept": report.tokens_per_byte}, scale=1 / 4096,
        ),
        *(
            [bars("Groups of duplicates by size", _groups(report.groups))]
            if any(report.groups.values())
            else []
        ),
    ]  # fmt: skip
    images = "".join(f'<img alt="plot" src="{as_image(figure)}">' for figure in plots)
    body = [
        f"<h1>{html.escape(name)}</h1>",
        f"<p>{html.escape(report.lines()[0])}</p>",
        "<h2>Sources</h2>",
        _table(
            ["source", "read", "kept", "dropped", "quarantined", "train tokens", "held-out tokens"],
            [
                [n, s["read"], s["kept"], s["dropped"], s["quarantined"], s["train_tokens"],
                 s["heldout_tokens"]]
                for n, s in report.sources.items()
            ],
        ),
        "<h2>Dropped</h2>",
        _table(["reason", "documents"], [[r, c] for r, c in report.dropped.items()]),
        f'<h2>Plots</h2><div class="plots">{images}</div>',
        "<h2>Time</h2>",
        _table(["stage", "seconds"], [[n, f"{s:.1f}"] for n, s in report.seconds.items()]),
        "<h2>20 documents that were kept</h2>",
        *(_sample(s) for s in report.samples if not s["reason"]),
        "<h2>20 documents that were dropped</h2>",
        *(_sample(s) for s in report.samples if s["reason"]),
        f"<h2>Settings</h2><pre>{html.escape(report.settings)}</pre>",
    ]  # fmt: skip
    head = f'<meta charset="utf-8"><title>{html.escape(name)}</title><style>{_STYLE}</style>'
    return f"<!doctype html><html><head>{head}</head><body>{''.join(body)}</body></html>\n"


def _groups(groups: dict[str, Numbers]) -> Numbers:
    found: Numbers = {}
    for kind, sizes in groups.items():
        for size, count in sizes.items():
            name = (
                f"{kind}, {size if int(size) < 5 else '5 to 9' if int(size) < 10 else '10 or more'}"
            )
            found[name] = found.get(name, 0) + count
    return found


def _table(head: list[str], rows: list[list[object]]) -> str:
    def row(cells: Iterable[object], tag: str) -> str:
        texts = (f"{c:,}" if isinstance(c, int) else html.escape(str(c)) for c in cells)
        return "<tr>" + "".join(f"<{tag}>{text}</{tag}>" for text in texts) + "</tr>"

    return f"<table>{row(head, 'th')}{''.join(row(cells, 'td') for cells in rows)}</table>"


def _sample(sample: dict[str, Any]) -> str:
    where = f"{sample['source']}: {sample['file']} at {sample['position']:,}"
    reason = f"{sample['reason']}; " if sample["reason"] else ""
    more = f"{reason}{sample['characters']:,} characters; {where}"
    return f'<div class="where">{html.escape(more)}</div><pre>{html.escape(sample["text"])}</pre>'
