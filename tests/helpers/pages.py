"""A page of the project, read as a browser would."""

from __future__ import annotations

from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "rect", "path", "circle"}
LOADING = {"script", "link", "img", "iframe", "object", "embed", "image", "base", "form"}


class Page(HTMLParser):
    """Checks that every tag is closed and nothing is run or loaded; collects text and tags."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.figures: list[str] = []
        self._paths: dict[str, list[str]] = defaultdict(list)
        self._label = ""
        source = path.read_text()
        self.feed(source)
        assert not self.open
        assert not LOADING & set(self.tags)
        assert "@import" not in source
        assert "url(h" not in source

    def paths(self, label: str) -> list[str]:
        """Return the paths of the picture with a label."""
        return self._paths[label]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        assert not [name for name in given if name == "src" or name.startswith("on")]
        for name in ("href", "xlink:href"):
            assert (given.get(name) or "#").startswith("#"), given
        self.tags.append(tag)
        if tag == "figure":
            self.figures.append("")
        if tag == "svg":
            self._label = given["aria-label"] or ""
        if tag == "path":
            self._paths[self._label].append(given["d"] or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if "figure" in self.open:
            self.figures[-1] += data
