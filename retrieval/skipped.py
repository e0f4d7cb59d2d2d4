"""The list of files that could not be read, as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from mmalign.errors import IndexDamagedError

from .storage import Manifest, verify_command

__all__ = ["read_skipped", "write_skipped"]


def read_skipped(folder: Path, manifest: Manifest) -> list[dict[str, Any]]:
    """One entry a file: `root`, `path`, `reason`, `message`, `size`, `mtime_ns`.

    Raises:
        IndexDamagedError: the file is gone or damaged.
    """
    name = manifest["skipped"]
    if not name:
        return []
    try:
        return [json.loads(line) for line in (folder / name).read_text(encoding="ascii").splitlines()]
    except FileNotFoundError:
        raise IndexDamagedError(
            f"{str(folder / name)!r} is gone; `refresh()` if the index has been written since it was opened, else "
            f"{verify_command(folder, repair=True)}"
        ) from None
    except ValueError:
        raise IndexDamagedError(
            f"{str(folder / name)!r} is damaged; {verify_command(folder, repair=True)} drops it"
        ) from None


def write_skipped(entries: Iterable[dict[str, Any]], file: IO[bytes]) -> None:
    """What `read_skipped` reads."""
    for entry in entries:
        file.write(json.dumps(entry).encode("ascii") + b"\n")
