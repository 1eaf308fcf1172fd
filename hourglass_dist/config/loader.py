"""The strict loader under ``config/schema.py``: sections, strict YAML, overrides, readable errors.

    file.yaml  ->  strict YAML (no repeated keys, 3e-4 is a number)  ->  dict
    key=value  ->  dotted path, lists by index                       ->  the same dict
    dict       ->  JSON  ->  pydantic in strict mode                 ->  a frozen Section

Every error is one line: where the value came from, its path, what is wrong, what was given,
the nearest valid name. The sources of these rules: PyYAML reads ``3e-4`` as text and keeps the
last of two equal keys; pydantic's lax mode turns ``yes`` into 1.
"""

from __future__ import annotations

import difflib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError
from pydantic_core import core_schema

S = TypeVar("S", bound="Section")


class ConfigError(ValueError):
    """Error in the settings. ``str(error)`` has one line for every mistake."""


def print_error(error: Exception) -> None:
    """Print a user's mistake to stderr, one line for each line of the error."""
    for line in (str(error) or type(error).__name__).splitlines():
        print(f"error: {line}", file=sys.stderr, flush=True)


class Section(BaseModel):
    """Frozen group of settings that refuses unknown keys, wrong types, NaN and infinity."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


class Built:
    """Marker in ``Annotated[T, Built(section)]``: the field is validated as ``section`` and stored
    as the dataclass T that ``section.build()`` returns."""

    def __init__(self, section: type[Section]) -> None:
        self.section = section

    def __get_pydantic_core_schema__(
        self, _: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return core_schema.no_info_after_validator_function(
            lambda written: written.build(),
            handler.generate_schema(self.section),
            serialization=core_schema.plain_serializer_function_ser_schema(asdict),
        )


# --- reading -------------------------------------------------------------------------------------


class _StrictLoader(yaml.SafeLoader):
    """YAML loader that reads ``3e-4`` as a number and dates as text, and refuses repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"expected a name as key, given {key!r}", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"repeated key {key!r}", key_node.start_mark
                )
            seen.add(key)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


_StrictLoader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if not tag.endswith((":float", ":int", ":timestamp", ":bool"))
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _resolve(tag: str, pattern: str, first: str) -> None:
    _StrictLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{tag}", re.compile(pattern), list(first)
    )


_resolve("bool", r"^(true|false)$", "tf")
_resolve("int", r"^[-+]?(0|[1-9][0-9_]*)$", "-+0123456789")
_resolve(
    "float",
    r"^[-+]?([0-9]+\.[0-9]*([eE][-+]?[0-9]+)?|\.[0-9]+([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.inf|\.nan)$",
    "-+.0123456789",
)


def _parse_yaml(text: str, source: str, is_several: bool = False) -> Any:
    try:
        if is_several:
            return list(yaml.load_all(text, Loader=_StrictLoader))
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{source}{where}: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: not valid YAML: {str(error).splitlines()[0]}") from None


def _read_text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: expected UTF-8 text: byte {error.start} is invalid") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def read_documents(path: Path) -> list[dict[str, Any]]:
    """Return the non-empty documents of a YAML file. Raises ConfigError as ``read_yaml`` does."""
    documents = [d for d in _parse_yaml(_read_text(path), str(path), is_several=True) if d]
    for document in documents:
        if not isinstance(document, dict):
            raise ConfigError(f"{path}: expected documents of keys, given {show(document)}")
    return documents


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return a YAML file as a dict. Raises ConfigError when it cannot be read, is not valid YAML,
    repeats a key or is not a mapping."""
    settings = _parse_yaml(_read_text(path), str(path))
    if not isinstance(settings, dict):
        raise ConfigError(
            f"{path}: expected sections such as 'model:' and 'data:', given {show(settings)}"
        )
    return settings


def apply_override(settings: dict[str, Any], override: str) -> str:
    """Set one ``dotted.path=value`` in ``settings`` and return the path.

    List items are addressed by index; the index one past the end appends. Raises ConfigError.
    """
    path, equals, text = override.partition("=")
    if not equals or not all(path.split(".")):
        raise ConfigError(
            f"command line: expected key=value such as train.steps=100, given {override!r}"
        )
    *parents, last = path.split(".")
    target: Any = settings
    for part in parents:
        if isinstance(target, dict) and target.get(part) is None:
            target[part] = {}
        target = target[_index(target, part, path)]
    value = _parse_yaml(text, f"command line: {path}")
    if isinstance(target, list) and last == str(len(target)):
        target.append(value)
    else:
        target[_index(target, last, path)] = value
    return path


def _index(target: Any, part: str, path: str) -> Any:
    if isinstance(target, dict):
        return part
    if isinstance(target, list):
        if part.isdecimal() and int(part) < len(target):
            return int(part)
        raise ConfigError(
            f"command line: {path}: expected an index from 0 to {len(target) - 1}, or "
            f"{len(target)} to append a whole item, given {part!r}"
        )
    raise ConfigError(
        f"command line: {path}: {part!r} is inside {show(target)}, which has no parts"
    )


# --- checking ------------------------------------------------------------------------------------


def parse(
    cls: type[S],
    settings: dict[str, Any],
    *,
    source: str,
    prefix: str = "",
    overridden: Sequence[str] = (),
) -> S:
    """Return ``settings`` as a validated section.

    Raises ConfigError with a line for every mistake. ``source`` names the file in messages.
    Mistakes at or below the paths in ``overridden`` are reported as from the command line.
    """
    try:
        return cls.model_validate_json(json.dumps(settings), strict=True)
    except ValidationError as error:
        lines = []
        for detail in error.errors():
            path, message = _explain(cls, detail, prefix)
            from_command_line = any(path == key or path.startswith(f"{key}.") for key in overridden)
            where = "command line" if from_command_line else source
            lines.append(": ".join(part for part in (where, path, message) if part))
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}
LIMITS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}


def _explain(cls: type[Section], detail: Any, prefix: str) -> tuple[str, str]:
    """Return one pydantic error as (dotted path, sentence)."""
    kind, given = detail["type"], show(detail["input"])
    parts = [
        str(part)
        for part in detail["loc"]
        if "[" not in str(part) and part not in ("int", "constrained-int")
    ]
    path = ".".join([prefix, *parts] if prefix else parts)
    context = detail.get("ctx", {})
    if kind == "extra_forbidden":
        return path, f"unknown key (given {given}){_nearest(cls, parts, prefix)}"
    if kind == "missing":
        return path, f"missing: {_describe(cls, parts)}"
    if kind == "value_error":  # a sentence of our own validators; most start with a path
        start, _, message = str(context["error"]).partition(": ")
        return (path, str(context["error"])) if " " in start else (start, message)
    if kind == "literal_error":
        return path, f"expected {context['expected'].replace(chr(39), '')}, given {given}"
    for name, words in LIMITS.items():
        if name in context:
            return path, f"expected {words} {context[name]:g}, given {given}"
    if kind in _EXPECTED:
        return path, f"expected {_EXPECTED[kind]}, given {given}"
    return path, f"{detail['msg'][:1].lower()}{detail['msg'][1:]}, given {given}"


def show(value: Any) -> str:
    """Return a value as text for messages, cut to 60 characters."""
    text = (
        json.dumps(value)
        if isinstance(value, (str, int, float, list, dict, type(None)))
        else str(value)
    )
    return text if len(text) <= 60 else text[:57] + "..."


def sections(cls: type[Section]) -> dict[str, type[Section]]:
    """Return field name -> section class, for fields that are a section or a list of sections."""
    found = {}
    for name, field in cls.model_fields.items():
        candidates: list[Any] = [field.annotation, *getattr(field.annotation, "__args__", ())]
        candidates += [mark.section for mark in field.metadata if isinstance(mark, Built)]
        for candidate in candidates:
            if isinstance(candidate, type) and issubclass(candidate, Section):
                found[name] = candidate
    return found


def paths(cls: type[Section], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted path, description) of every setting below a section."""
    inner = sections(cls)
    for name, field in cls.model_fields.items():
        if name in inner:
            is_list = "list[" in str(field.annotation)
            yield from paths(inner[name], f"{prefix}{name}.{'0.' if is_list else ''}")
        else:
            yield f"{prefix}{name}", " ".join((field.description or "").split())


def _owner(cls: type[Section], parts: Sequence[str]) -> type[Section]:
    for part in parts[:-1]:
        cls = sections(cls).get(part, cls)
    return cls


def _describe(cls: type[Section], parts: Sequence[str]) -> str:
    field = _owner(cls, parts).model_fields.get(parts[-1])
    return (
        " ".join((field.description or "").split())
        if field and field.description
        else "this section is required"
    )


def _nearest(cls: type[Section], parts: Sequence[str], prefix: str) -> str:
    """Return ``; did you mean ...?`` with the same name elsewhere, a similar one in the same
    section, or a similar one elsewhere, in this order; empty when nothing is near."""
    name = parts[-1]
    everywhere = {
        path.rsplit(".", 1)[-1]: path for path, _ in paths(cls, f"{prefix}." * bool(prefix))
    }
    if name in everywhere:
        return f"; did you mean {everywhere[name]}?"
    beside = difflib.get_close_matches(name, list(_owner(cls, parts).model_fields), n=1)
    if beside:
        return f"; did you mean {'.'.join([prefix] * bool(prefix) + [*parts[:-1], beside[0]])}?"
    elsewhere = difflib.get_close_matches(name, list(everywhere), n=1, cutoff=0.75)
    return f"; did you mean {everywhere[elsewhere[0]]}?" if elsewhere else ""


# --- writing -------------------------------------------------------------------------------------


def to_yaml(config: Section) -> str:
    """Return the settings, all defaults filled in, as YAML that ``load`` reads back as equal."""
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=120)
    return text


def differences(old: Section, new: Section) -> list[str]:
    """Return ``path: old -> new`` for every setting that differs."""

    def flatten(value: Any, path: str) -> Iterator[tuple[str, Any]]:
        pairs = (
            value.items()
            if isinstance(value, dict)
            else enumerate(value)
            if isinstance(value, list)
            else None
        )
        if pairs is None:
            yield path, value
        else:
            for key, inner in pairs:
                yield from flatten(inner, f"{path}.{key}" if path else str(key))

    before, after = (
        dict(flatten(old.model_dump(mode="json"), "")),
        dict(flatten(new.model_dump(mode="json"), "")),
    )
    return [
        f"{path}: {show(before.get(path))} -> {show(after.get(path))}"
        for path in [*before, *(p for p in after if p not in before)]
        if before.get(path, _MISSING) != after.get(path, _MISSING)
    ]


_MISSING = object()
