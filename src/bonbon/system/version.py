"""The version of BoNBoN that is installed."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version


@cache
def installed_version() -> str:
    """Return the version from the installed metadata; else `unknown`."""
    try:
        return version("bonbon-align")
    except PackageNotFoundError:  # a source tree on the path, as in vLLM's own environment
        return "unknown"
