"""Results of checks kept in a folder, so that data are decoded once and not at every start."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mmalign
from mmalign.errors import InputError, reason_of
from mmalign.files import whole_file

from .rows import Example, ImageRef, Problem
from .sources import RowSource

__all__ = ["CheckMemory", "write_json_lines"]

_FORMAT = 2


class CheckMemory:
    """What is known of one source under one set of options; JSON lines under a name derived from both.

    Raises:
        InputError: the folder cannot be made or written to.
    """

    def __init__(self, folder: Path, source: RowSource, options: dict[str, Any]) -> None:
        self.folder, self._source, self._options = folder, source, options
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"folder {str(folder)!r} cannot be made ({reason_of(error)}); give another one") from None
        self._name = f"check-{self._key()}"

    def load(self) -> tuple[list[Example], list[Problem]] | None:
        """Examples and problems of an earlier run, if nothing has changed since."""
        examples: list[Example] = []
        problems: list[Problem] = []
        lines = self._read(self._name)
        for entry in lines or ():
            if "reason" in entry:
                problems.append(Problem(**entry))
            else:
                images = tuple(ImageRef(*image) for image in entry.pop("images"))
                rewards = entry.pop("rewards")
                examples.append(Example(**entry, images=images, rewards=tuple(rewards) if rewards else None))
        return None if lines is None else (examples, problems)

    def save(self, examples: list[Example], problems: list[Problem]) -> None:
        """Keep a result, unless the source has changed since the check began."""
        if self._name != f"check-{self._key()}":
            return
        self._write(self._name, [*map(_as_json, examples), *map(asdict, problems)])

    def load_scores(self, key: str) -> list[list[float]] | None:
        """Scores kept under a key that says what was scored, and by what."""
        lines = self._read(f"scores-{key[:32]}")
        return None if lines is None else [entry["scores"] for entry in lines]

    def save_scores(self, key: str, scores: Iterable[tuple[float, ...]]) -> None:
        """Keep scores."""
        self._write(f"scores-{key[:32]}", [{"scores": row} for row in scores])

    def _key(self) -> str:
        # The reader of images may judge differently in another release.
        known = [_FORMAT, mmalign.__version__, self._source.name, self._source.state(), self._options]
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:32]

    def _read(self, name: str) -> list[dict[str, Any]] | None:
        try:
            with (self.folder / f"{name}.jsonl").open(encoding="utf-8") as file:
                entries = [json.loads(line) for line in file]
            complete = bool(entries) and entries.pop() == {"lines": len(entries)}
        except (OSError, ValueError, RecursionError):
            return None
        return entries if complete else None

    def _write(self, name: str, entries: list[dict[str, Any]]) -> None:
        write_json_lines(self.folder / f"{name}.jsonl", [*entries, {"lines": len(entries)}])


def _as_json(example: Example) -> dict[str, Any]:
    return {
        "row": example.row,
        "name": example.name,
        "caption": example.caption,
        "images": [(image.sha256, image.height, image.width) for image in example.images],
        "winner": example.winner,
        "rewards": example.rewards,
    }


def write_json_lines(path: Path, entries: Iterable[dict[str, Any]]) -> None:
    """Write one object a line: the whole file or nothing.

    Raises:
        InputError: the file cannot be written.
    """
    with whole_file(path) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in entries)
