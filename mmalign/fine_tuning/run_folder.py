"""Where a run keeps what it goes on from, and what has to be so before it begins."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import filelock

from ..alignment.split import ImageSplits
from ..encoders import Encoder
from ..errors import InputError, LockedError, reason_of
from ..files import whole_file
from ..pairs import CaptionedImage

__all__ = ["check_same_run", "check_target", "data_digest", "locked"]


def check_target(target: Path, old: Encoder, name: str) -> None:
    """Refuse to write over anything but an encoder folder, and over the encoder that is begun from.

    Raises:
        InputError: it would be lost.
    """
    if not target.exists():
        return
    if not (target / "encoder.json").is_file():
        raise InputError(f"{str(target)!r} exists and is not an encoder folder; choose another OUT")
    try:
        there = json.loads((target / "encoder.json").read_text(encoding="utf-8"))["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        there = None
    if there == old.fingerprint:
        raise InputError(f"{str(target)!r} is {name} itself, which would be replaced; choose another OUT")


def data_digest(content: Sequence[str], images: Sequence[CaptionedImage], splits: ImageSplits) -> str:
    """Of all that the run takes from the data, in order."""
    digest = hashlib.sha256()
    sides = splits.training & ~splits.validation, splits.test
    for row, image in enumerate(images):
        line = f"{content[row]} {int(sides[0][row])}{int(sides[1][row])} {image.label}\n"
        digest.update(line.encode(errors="surrogatepass"))
    return digest.hexdigest()


def check_same_run(work: Path, settings: dict[str, Any]) -> None:
    """Leave the settings beside the checkpoint, or compare with those there.

    Raises:
        InputError: they differ.
    """
    path = work / "settings.json"
    try:
        there = (
            json.loads(path.read_text(encoding="utf-8")) if (work / "checkpoint.safetensors").is_file() else settings
        )
    except (OSError, ValueError):
        there = {}
    differing = [
        f"{name} {there.get(name)!r}, now {value!r}" for name, value in settings.items() if there.get(name) != value
    ]
    if differing:
        raise InputError(
            f"{str(work)!r} holds a stopped run of other settings ({'; '.join(differing)}); give those to go on, "
            "delete the folder, or choose another OUT"
        )
    with whole_file(path) as fresh:
        fresh.write_text(json.dumps(settings, indent=1), encoding="utf-8")


@contextlib.contextmanager
def locked(work: Path) -> Iterator[None]:
    """Make the folder, and have it for this process alone.

    Raises:
        LockedError: another process has it.
        InputError: it cannot be written.
    """
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(work / ".lock", timeout=0)
        lock.acquire()
    except filelock.Timeout:
        raise LockedError(f"another process is training in {str(work)!r}; choose another OUT, or wait for it") from None
    except OSError as error:
        raise InputError(f"{str(work)!r} cannot be written ({reason_of(error)}); choose another OUT") from None
    try:
        yield
    finally:
        lock.release()
