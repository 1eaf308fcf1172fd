"""Draws docs/hourglass.svg, the picture of the README: python docs/draw_hourglass.py

A cell is one position of the sequence, a column of cells one layer. The ribbons are exact: on the
way in, bucket i pools the positions i*s-s+1 to i*s (dashed cells are the zeros shifted in); on the
way out, it reaches the positions i*s to i*s+s-1. No bucket is used before its last position.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from xml.sax.saxutils import escape

TEXT = "To be, or not"  # one more than the positions: what comes in, and what comes out one later
POSITIONS = len(TEXT) - 1
SHORTEN = (1, 2, 2)  # level by level
LAYERS = (3, 2, 6)  # columns on each side; all of them at the innermost level

WIDTH, HEIGHT, MIDDLE = 1040, 412, 192
CELL, PITCH, COLUMN, FUNNEL, PADDING, SHIFTED_IN = 16, 20, 26, 92, 11, 6
CARD, PANEL, INK, QUIET = "#10172b", "#1b2440", "#f4ecdc", "#98a3c4"
SAND = ("#f6d38b", "#f2a65a", "#e76f51")  # level by level
SANS = "ui-sans-serif, -apple-system, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"


@dataclass(frozen=True)
class Stack:
    """The layers of one level on one side: where they stand, and how many positions they have."""

    level: int
    left: float
    columns: int
    cells: int

    @property
    def right(self) -> float:
        return self.left + (self.columns - 1) * COLUMN + CELL

    def top(self, cell: int) -> float:
        """The upper edge of a cell; -1 is the place above the first one."""
        return MIDDLE - (self.cells * PITCH - (PITCH - CELL)) / 2 + cell * PITCH

    def bottom(self, cell: int) -> float:
        return self.top(cell) + CELL


def stacks() -> tuple[list[Stack], list[Stack]]:
    """The stacks on the way in (the innermost one is last) and on the way out (innermost first)."""
    cells, sizes = POSITIONS, []
    for shorten in SHORTEN:
        cells = -(-cells // shorten)
        sizes.append(cells)
    levels = list(range(len(SHORTEN)))
    shapes = [(level, LAYERS[level], sizes[level]) for level in [*levels, *levels[-2::-1]]]
    total = sum((n - 1) * COLUMN + CELL for _, n, _ in shapes) + FUNNEL * (len(shapes) - 1)
    left, placed = (WIDTH - total) / 2, []
    for level, columns, size in shapes:
        placed.append(Stack(level, left, columns, size))
        left = placed[-1].right + FUNNEL
    return placed[: len(levels)], placed[len(levels) - 1 :]


def text(x: float, y: float, words: str, size: float = 13, fill: str = INK, **more: str) -> str:
    style = {"text-anchor": "middle", "font-family": SANS, "font-size": f"{size:g}"}
    style |= {name.replace("_", "-"): value for name, value in more.items()}
    attributes = " ".join(f'{name}="{value}"' for name, value in style.items())
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{fill}" {attributes}>{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, radius: float, style: str) -> str:
    size = f'width="{width:.1f}" height="{height:.1f}" rx="{radius:g}"'
    return f'<rect x="{x:.1f}" y="{y:.1f}" {size} {style}/>'


def panel(stack: Stack) -> str:
    """What holds the layers of a stack together."""
    top = stack.top(0) - PADDING
    size = (stack.right - stack.left + 2 * PADDING, stack.bottom(stack.cells - 1) + PADDING - top)
    return box(stack.left - PADDING, top, *size, 10, f'fill="{PANEL}"')


def columns(stack: Stack) -> list[str]:
    """The cells of all layers of a stack."""
    style = f'fill="{SAND[stack.level]}"'
    return [
        box(stack.left + column * COLUMN, stack.top(cell), CELL, CELL, 4, style)
        for column in range(stack.columns)
        for cell in range(stack.cells)
    ]


def ribbon(left: tuple[float, float, float], right: tuple[float, float, float], paint: str) -> str:
    """A band from one vertical edge to another; an edge is (x, upper y, lower y)."""
    (x0, above0, below0), (x1, above1, below1) = left, right
    bend = f"{(x0 + x1) / 2:.1f}"
    upper = f"M{x0:.1f} {above0:.1f} C{bend} {above0:.1f} {bend} {above1:.1f} {x1:.1f} {above1:.1f}"
    lower = f"L{x1:.1f} {below1:.1f} C{bend} {below1:.1f} {bend} {below0:.1f} {x0:.1f} {below0:.1f}"
    return f'<path d="{upper} {lower} Z" fill="url(#{paint})"/>'


def pooling(outer: Stack, inner: Stack) -> list[str]:
    """Shift and pool: every bucket ends at the position from which it is used."""
    s, parts = SHORTEN[inner.level], []
    dashed = f'fill="{CARD}" stroke="{SAND[outer.level]}" stroke-dasharray="3 2.4" opacity=".75"'
    for cell in range(1 - s, 0):
        x, y = outer.right - CELL + 0.5, outer.top(cell) - SHIFTED_IN
        parts.append(box(x, y, CELL - 1, CELL - 1, 4, dashed))
    for bucket in range(inner.cells):
        first, last = bucket * s - s + 1, bucket * s
        above = outer.top(first) - (SHIFTED_IN if first < 0 else 0)
        left = (outer.right + 2, above, outer.bottom(last))
        right = (inner.left - 2, inner.top(bucket), inner.bottom(bucket))
        parts.append(ribbon(left, right, f"in{inner.level}"))
    return parts


def upsampling(inner: Stack, outer: Stack) -> list[str]:
    """Every bucket goes to the s positions from its last one on."""
    s, parts = SHORTEN[inner.level], []
    for bucket in range(inner.cells):
        first, last = bucket * s, min(bucket * s + s, outer.cells) - 1
        left = (inner.right + 2, inner.top(bucket), inner.bottom(bucket))
        right = (outer.left - 2, outer.top(first), outer.bottom(last))
        parts.append(ribbon(left, right, f"out{inner.level}"))
    return parts


def residual(pre: Stack, post: Stack) -> list[str]:
    """The way around the inner levels, below them."""
    x0, x1 = pre.right - CELL / 2, post.left + CELL / 2
    y = pre.bottom(pre.cells - 1) + 3
    low = y + 27
    path = f"M{x0:.1f} {y:.1f} V{low - 14:.1f} q0 14 14 14 H{x1 - 14:.1f} q14 0 14 -14 V{y + 5:.1f}"
    colour = SAND[pre.level]
    line = f'fill="none" stroke="{colour}" stroke-width="1.6" marker-end="url(#tip{pre.level})"'
    return [
        f'<path d="{path}" {line}/>',
        text((x0 + x1) / 2, low - 7, "residual", 12, colour),
    ]


def letters(pre: Stack, post: Stack) -> list[str]:
    """The bytes that come in, and the next bytes that come out."""
    parts = []
    for cell in range(POSITIONS):
        y = pre.top(cell) + 13
        for x, letter in ((pre.left - 28, TEXT[cell]), (post.right + 28, TEXT[cell + 1])):
            parts.append(text(x, y, letter.replace(" ", "␣"), 14, INK, font_family=MONO))
    for x, words in ((pre.left - 28, "bytes in"), (post.right + 28, "next bytes")):
        parts.append(text(x, pre.top(0) - 20, words, 12, QUIET))
    return parts


def captions(down: list[Stack], up: list[Stack]) -> list[str]:
    """What happens between the levels; stride and depth below each stack."""
    parts = []
    for pre, post in zip(down[:-1], reversed(up[1:]), strict=True):
        y = pre.top(-1) - 18
        parts.append(text(pre.right + FUNNEL / 2 - 8, y, "shift + pool", 12, SAND[pre.level]))
        parts.append(text(post.left - FUNNEL / 2 + 8, y, "upsample", 12, SAND[pre.level]))
    for stack in [*down, *up[1:]]:
        x, stride = (stack.left + stack.right) / 2, prod(SHORTEN[: stack.level + 1])
        words = f"{stack.columns} layers" + (
            f" on 1/{stride} of the length" if stack == down[-1] else ""
        )
        parts.append(
            text(x, HEIGHT - 36, f"stride {stride}", 14, SAND[stack.level], font_weight="600")
        )
        parts.append(text(x, HEIGHT - 18, words, 12, QUIET))
    return parts


def definitions() -> str:
    """Gradients of the ribbons and the tips of the arrows."""
    parts = []
    for level in range(1, len(SHORTEN)):
        for name, start, end in (("in", level - 1, level), ("out", level, level - 1)):
            stops = "".join(
                f'<stop offset="{offset}" stop-color="{SAND[colour]}" stop-opacity="{opacity}"/>'
                for offset, colour, opacity in ((0, start, 0.5), (1, end, 0.5))
            )
            parts.append(f'<linearGradient id="{name}{level}">{stops}</linearGradient>')
    for level, colour in enumerate(SAND):
        size = 'viewBox="0 0 8 8" refX="5" refY="4" markerWidth="7" markerHeight="7" orient="auto"'
        shape = f'<path d="M0 0.5 L7.5 4 L0 7.5 Z" fill="{colour}"/>'
        parts.append(f'<marker id="tip{level}" {size}>{shape}</marker>')
    return f"<defs>{''.join(parts)}</defs>"


def draw() -> str:
    """The whole picture as SVG text."""
    down, up = stacks()
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">',
        "<title>An hourglass language model: pooled to a quarter of its length, and back</title>",
        definitions(),
        box(0, 0, WIDTH, HEIGHT, 16, f'fill="{CARD}"'),
    ]
    for stack in [*down, *up[1:]]:
        parts.append(panel(stack))
    for outer, inner in pairwise(down):
        parts += pooling(outer, inner)
    for inner, outer in pairwise(up):
        parts += upsampling(inner, outer)
    for stack in [*down, *up[1:]]:
        parts += columns(stack)
    for pre, post in zip(down[:-1], reversed(up[1:]), strict=True):
        parts += residual(pre, post)
    parts += letters(down[0], up[-1])
    parts += captions(down, up)
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    target = Path(__file__).with_name("hourglass.svg")
    target.write_text(draw(), encoding="utf-8")
    print(target)
