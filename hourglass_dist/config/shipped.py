"""Files shipped with the package, and the lookup of a bare name such as ``quickstart``.

checkout, editable install    ROOT/configs, ROOT/launch         beside hourglass_dist/
wheel                         hourglass_dist/shipped/configs, hourglass_dist/shipped/launch
"""

from __future__ import annotations

import difflib
import os
import sys
from pathlib import Path

from hourglass_dist.config.loader import ConfigError

_PACKAGE = Path(__file__).parents[1]
_IN_WHEEL = _PACKAGE / "shipped"
_ROOT = _IN_WHEEL if _IN_WHEEL.is_dir() else _PACKAGE.parent
CONFIGS = _ROOT / "configs"
"""Folder of settings files: runs, data pipelines in ``prepare/``, comparisons in ``compare/``."""
LAUNCH = _ROOT / "launch"
"""Folder of scripts that start a run on the machines of a cluster."""


def find(name: str | Path, folder: Path = CONFIGS, suffix: str = ".yaml") -> Path:
    """Return the file (or folder) that a path or a bare name refers to.

    A bare name has no ``/`` and no suffix. A file of that name, or NAME.yaml, in the current folder
    takes precedence over the shipped one; one line on stderr says which was taken. Raises
    ConfigError with the nearest shipped names when neither exists.
    """
    given, shipped = Path(name), folder / f"{name}{suffix}"
    is_bare = len(given.parts) == 1 and not given.suffix
    if not is_bare or not shipped.exists():
        if not given.exists():
            raise ConfigError(f"{name}: no such file{_hint(given, is_bare, folder, suffix)}")
        return given
    own = [p for p in (given, Path(f"{name}{suffix}")) if p.exists()]
    own = [p for p in own if p.is_dir() == shipped.is_dir()]
    if os.environ.get("RANK", "0") == "0":
        taken = f"{own[0]} in this folder, not the shipped one" if own else f"the shipped {shipped}"
        print(f"{name}: taking {taken}", file=sys.stderr, flush=True)
    return own[0] if own else shipped


def _hint(given: Path, is_bare: bool, folder: Path, suffix: str) -> str:
    names = sorted(path.name.removesuffix(suffix) for path in folder.glob(f"*{suffix}"))
    close = difflib.get_close_matches(given.name.removesuffix(suffix), names)
    if close:
        return f"; did you mean the shipped {' or '.join(close)}?"
    return f"; shipped with the package: {', '.join(names)}" if is_bare else ""
