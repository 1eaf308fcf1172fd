"""Long lists of cases: the default suite takes a few of them, ``launch/test.sh --all`` the rest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def every(distance: int, cases: Iterable[Any]) -> list[Any]:
    """For ``parametrize``: all cases but each ``distance``-th, from the first on, are slow ones."""
    return [
        case
        if index % distance == 0
        else pytest.param(*(case if type(case) is tuple else (case,)), marks=pytest.mark.slow)
        for index, case in enumerate(cases)
    ]
