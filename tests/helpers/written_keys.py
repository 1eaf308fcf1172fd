"""Which settings a file writes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def written_keys(settings: Any, schema: set[str], path: str = "") -> Iterator[str]:
    """Dotted schema paths that a settings file writes; the index of a list item counts as 0."""
    if path in schema:
        yield path
    elif isinstance(settings, dict):
        for key, inner in settings.items():
            yield from written_keys(inner, schema, f"{path}.{key}" if path else key)
    else:
        for inner in settings:
            yield from written_keys(inner, schema, f"{path}.0")
