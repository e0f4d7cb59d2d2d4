"""What everything that is written says about how it came about: versions and time, under the same names everywhere."""

from __future__ import annotations

import time
from importlib.metadata import PackageNotFoundError, version

__all__ = ["libraries", "written_now"]


def libraries(*distributions: str) -> dict[str, str]:
    """Versions of mmalign, torch and those of `distributions` that are installed."""
    found = {}
    for name in ("mmalign", "torch", *distributions):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def written_now() -> str:
    """The time in UTC, to the second, as ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
