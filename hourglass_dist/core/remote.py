"""Object stores and web servers through fsspec: opening them, and the rule of retries."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")

EXTRAS = {
    "s3": ("s3fs", "s3"),
    "gs": ("gcsfs", "gcs"),
    "http": ("aiohttp", "http"),
    "https": ("aiohttp", "http"),
}
"""Package that reads each scheme, and our extra that installs it."""
_NEVER = (
    FileExistsError,
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)
FIRST_WAIT_S, LONGEST_WAIT_S = 0.25, 15.0


def is_remote(where: str) -> bool:
    """Return whether an address is a URL and not a path."""
    return re.match(r"^[a-z0-9]+://", where) is not None


def open_filesystem(url: str, timeout_s: float) -> tuple[Any, str]:
    """Return the fsspec file system (without retries of its own) of an address, and the path in it.

    Raises ValueError for an unknown scheme or a missing package.
    """
    scheme = url.partition("://")[0]
    package, extra = EXTRAS.get(scheme, ("fsspec", "s3"))
    try:
        from fsspec.core import url_to_fs

        __import__(package)
    except ImportError:
        raise ValueError(
            f"{url}: needs the package {package}: pip install 'hourglass_dist[{extra}]'"
        ) from None
    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if scheme == "s3":
        options["config_kwargs"] = {
            "connect_timeout": timeout_s,
            "read_timeout": timeout_s,
            "retries": {"total_max_attempts": 1},
        }
    elif scheme in ("http", "https"):
        import aiohttp

        options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(total=timeout_s)}
    try:
        system, path = url_to_fs(url, **options)
    except ValueError as error:
        raise ValueError(f"{url}: {error}") from None
    system.retries = 1  # for s3fs: ``retry`` alone retries
    return system, path


def retry(address: str, action: Callable[[], T], deadline_s: float) -> T:
    """Return the result of ``action``, retried with growing pauses after temporary errors:
    timeouts, broken connections, bodies of a wrong length, the statuses 408, 425, 429 and 5xx.

    Raises ValueError, naming the address, after ``deadline_s`` seconds, or at once for a permanent
    error (missing, forbidden).
    """
    begun, wait, tries = time.monotonic(), FIRST_WAIT_S, 0
    while True:
        tries += 1
        try:
            return action()
        except Exception as error:
            reason = _reason(error)
            if not _may_pass(error):
                raise ValueError(f"{address}: {reason}") from error
            spent = time.monotonic() - begun
            if spent + wait > deadline_s:
                raise ValueError(
                    f"{address}: gave up after {tries} tries in {spent:.0f} s: {reason}"
                ) from error
        time.sleep(wait * random.uniform(0.5, 1.5))
        wait = min(2 * wait, LONGEST_WAIT_S)


def _status(error: BaseException) -> int | None:
    for value in (getattr(error, "status", None), getattr(error, "code", None)):
        with suppress(TypeError, ValueError):
            return int(value)  # type: ignore[arg-type]
    return None


def _may_pass(error: Exception) -> bool:
    status = _status(error)
    if status is not None:
        return status in (408, 425, 429) or status >= 500
    if isinstance(error, _NEVER) or type(error).__name__ == "NoCredentialsError":
        return False
    return not isinstance(error, (TypeError, AttributeError, ImportError))


def _reason(error: Exception) -> str:
    status = _status(error)
    names = {401: "not authorised", 403: "forbidden", 404: "not found"}
    if status is not None:
        return f"status {status}" + (f" ({names[status]})" if status in names else "")
    if isinstance(error, FileNotFoundError):
        return "not found"
    if isinstance(error, PermissionError):
        return f"forbidden ({error})"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300] if text else type(error).__name__
