"""Bytes, counts and durations as text, in the form that all output uses."""

from __future__ import annotations


def show_bytes(count: float) -> str:
    """Return bytes in the largest binary unit with a value of at least 1: ``1.50 MiB``."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while count >= 1024 and len(units) > 1:
        count /= 1024
        units.pop(0)
    return f"{count:.0f} B" if units[0] == "B" else f"{count:.2f} {units[0]}"


def show_count(count: float) -> str:
    """Return a count with three significant digits: ``1.05 T``."""
    for power, unit in enumerate(("", " k", " M", " G", " T", " P", " E")):
        if count < 1000 ** (power + 1):
            return f"{count / 1000**power:.3g}{unit}"
    return f"{count / 1000**7:.3g} Z"


def show_duration(seconds: float) -> str:
    """Return a duration: ``3:07``, from one hour on ``1:03:07``, from two days on ``2.5 days``."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 48:
        return f"{seconds / 86400:,.1f} days"
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
