"""``hourglass config --describe``: the meaning of settings, from the docstrings of the sections."""

from __future__ import annotations

import difflib
import json
import textwrap
from collections.abc import Iterator
from typing import Any

from pydantic.fields import FieldInfo

from hourglass_dist.config.loader import LIMITS, ConfigError, Section, sections

_TYPES = {
    "integer": "whole number",
    "number": "number",
    "string": "text",
    "boolean": "true or false",
    "null": "null",
    "object": "mapping",
}
_JSON_LIMITS = {
    "exclusiveMinimum": "gt",
    "minimum": "ge",
    "exclusiveMaximum": "lt",
    "maximum": "le",
}


def describe(cls: type[Section], key: str = "") -> str:
    """Return type, default and meaning of the setting ``key``, or of all settings below it.

    Raises ConfigError with the nearest key when there is no such key.
    """
    wanted = ".".join("0" if part.isdecimal() else part for part in key.split("."))
    entries = dict(_entries(cls, ""))
    texts = [
        text
        for path, text in entries.items()
        if not key or path == wanted or path.startswith(f"{wanted}.")
    ]
    if not texts:
        elsewhere = [path for path in entries if path.endswith(f".{wanted}")]
        close = elsewhere or difflib.get_close_matches(wanted, entries, n=1)
        raise ConfigError(f"{key}: unknown key{f'; did you mean {close[0]}?' if close else ''}")
    return "\n".join(texts).lstrip("\n") + "\n"


def _entries(cls: type[Section], prefix: str) -> Iterator[tuple[str, str]]:
    """Yield (dotted path, text) of every section and setting below ``cls``."""
    properties = cls.model_json_schema()["properties"]
    inner = sections(cls)
    for name, field in cls.model_fields.items():
        path, section = f"{prefix}{name}", inner.get(name)
        if section is None:
            kind = f"{_type(properties[name])}; {_default(field)}"
            yield path, f"{path}: {kind}\n{_wrapped(field.description or '')}"
            continue
        is_list = "list[" in str(field.annotation)
        kind = f"list of sections {path}.0, {path}.1, ..." if is_list else "section"
        if field.default is None:
            kind += "; default null"
        words = field.description or section.__doc__ or ""
        yield path, f"\n{path}: {kind}\n{_wrapped(words)}"
        yield from _entries(section, f"{path}.0." if is_list else f"{path}.")


def _default(field: FieldInfo) -> str:
    if field.is_required():  # a level inherits from the model
        return "optional" if "Left out:" in (field.description or "") else "required"
    return f"default {json.dumps(field.get_default(call_default_factory=True))}"


def _wrapped(text: str) -> str:
    words = " ".join(text.replace("``", "").split())
    return textwrap.fill(words, 96, initial_indent="    ", subsequent_indent="    ")


def _type(schema: dict[str, Any]) -> str:
    """Return a JSON schema's type and limits as words."""
    if "anyOf" in schema:
        return ", or ".join(_type(part) for part in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return " | ".join(map(str, schema.get("enum", [schema.get("const")])))
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'])}"
    words = _TYPES.get(schema.get("type", ""), "value")
    limits = [f"{LIMITS[n]} {schema[k]:g}" for k, n in _JSON_LIMITS.items() if k in schema]
    return " ".join([words, " and ".join(limits)]).strip()
