"""HTML page in one file that can be mailed: no scripts, nothing loaded, everything escaped.

The builders below return HTML. Text that they are given is escaped; arguments named ``content``
are HTML already.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

from hourglass_dist.pages.style import STYLE

_NUMBER = re.compile(r"[-+]?\d[\d,.:e+-]*( ?[kMGTPE%x]| ?[KMGT]?i?B| s)?")


class Section(NamedTuple):
    """Section of a page."""

    title: str
    content: str
    """Content as HTML; a section with none is omitted."""
    is_folded: bool = False
    """Whether the section is closed until a reader opens it; it is open in print."""


def page(title: str, state: str, top: str, sections: Sequence[Section]) -> str:
    """Return a page: a heading with a line under it, the top, links to the sections, sections."""
    shown = [section for section in sections if section.content]
    links = "".join(
        f'<a href="#part-{number}">{escape(section.title)}</a>'
        for number, section in enumerate(shown)
    )
    body = "".join(_section(number, section) for number, section in enumerate(shown))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f'<header><h1>{escape(title)}</h1><p class="state">{escape(state)}</p></header>'
        f"{top}<nav>{links}</nav>{body}</main></body></html>\n"
    )


def _section(number: int, section: Section) -> str:
    heading = f"<h2>{escape(section.title)}</h2>"
    content = f'<div id="part-{number}">{section.content}</div>'  # a link to it opens the section
    if section.is_folded:
        return f"<details><summary>{heading}</summary>{content}</details>"
    return f"<section>{heading}{content}</section>"


def cards(values: Mapping[str, str | None]) -> str:
    """Return boxes with named values; those that are None are left out."""
    boxes = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in values.items()
        if value is not None
    )
    return f"<dl>{boxes}</dl>"


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], shares: Sequence[float] | None = None
) -> str:
    """Return a table with numbers aligned on the right; "" without rows. ``shares`` (0 to 1, one
    for each row) are drawn as bars in a last column."""
    if not rows:
        return ""
    columns = zip(*rows, strict=True)
    numeric = [
        any(column) and all(not cell or _NUMBER.fullmatch(cell) for cell in column)
        for column in columns
    ]
    kinds = [' class="number"' if is_number else "" for is_number in numeric]

    def line(cells: Sequence[str], tag: str, bar: str) -> str:
        texts = zip(cells, kinds, strict=True)
        row = "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for cell, kind in texts)
        return f"<tr>{row}{bar}</tr>"

    bars = [""] * len(rows)
    if shares is not None:
        bars = [
            f'<td class="bar"><i style="width:{100 * share:.1f}%"></i></td>' for share in shares
        ]
    body = "".join(line(cells, "td", bar) for cells, bar in zip(rows, bars, strict=True))
    top = line(head, "th", "<th></th>" if shares is not None else "")
    return f'<div class="wide"><table>{top}{body}</table></div>'


def short_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; columns of equal values become one line above it."""
    if len(rows) < 2:
        return table(head, rows)
    columns = list(zip(*rows, strict=True))
    same = [number for number, column in enumerate(columns) if len(set(column)) == 1]
    rest = [number for number in range(len(columns)) if number not in same]
    said = "; ".join(f"{head[number]}: {rows[0][number]}" for number in same if rows[0][number])
    note = paragraph(f"The same each time: {said}.") if said else ""
    return note + table([head[n] for n in rest], [[row[n] for n in rest] for row in rows])


def paragraph(text: str) -> str:
    """Return a paragraph of text."""
    return f"<p>{escape(text)}</p>"


def preformatted(text: str) -> str:
    """Return text in a fixed-width font; "" for no text."""
    return f'<div class="wide"><pre>{escape(text)}</pre></div>' if text else ""


def figure(title: str, note: str, content: str, legend: Mapping[str, tuple[str, str]]) -> str:
    """Return a figure with its title; ``legend`` gives each name a CSS colour and a value."""
    items = "".join(
        f'<span><i style="background:{colour}"></i>{escape(name)} <b>{escape(value)}</b></span>'
        for name, (colour, value) in legend.items()
    )
    small = f" <small>{escape(note)}</small>" if note else ""
    keys = f'<p class="legend">{items}</p>' if items else ""
    caption = f"<figcaption><b>{escape(title)}</b>{small}</figcaption>"
    return f"<figure>{caption}{keys}{content}</figure>"


def grid(contents: Sequence[str], kind: str = "charts") -> str:
    """Return contents in as many columns as fit, three at most; "" without any."""
    return f'<div class="{kind}">{"".join(contents)}</div>' if any(contents) else ""


def quotation(about: str, text: str) -> str:
    """Return a text with its line breaks, under a line about it."""
    return f"<article><small>{escape(about)}</small><p>{escape(text)}</p></article>"
