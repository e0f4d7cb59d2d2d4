"""A folder of images with `metadata.jsonl`: one JSON object a line."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmalign.errors import InputError

from .rows import Row, likely_column, unformed
from .sources import RowSource, digest_files

__all__ = ["MetadataSource", "parse_line"]

_CAPTIONS = ("caption", "text")
# File columns, and the rewards of their images; the first of which a line has a column is taken.
_LAYOUTS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("winner", "loser"), ("reward_0", "reward_1")),
    (("jpg_0", "jpg_1"), ("reward_0", "reward_1")),
    (("file_name",), ("reward",)),
)
_WANTED = "caption with winner and loser, or jpg_0, jpg_1 and label_0, or file_name"


class MetadataSource(RowSource):
    """Rows of a JSON-lines file; paths are relative to its folder.

    A line has `caption` (or `text`) and either `winner` and `loser`, or `jpg_0`, `jpg_1` and `label_0`, or for one
    image `file_name`; rewards are `reward_0` and `reward_1`, or `reward`. `winner_file_name` and the like do as well.
    `state` covers the images, too.

    Raises:
        InputError: the file cannot be read.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.folder, self.name = file, file.parent, str(file)
        self._offsets, self._numbers = array("q"), array("q")
        offset = 0
        try:
            with file.open("rb") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        if not self._offsets and isinstance(entry := parse_line(line), dict):
                            self.columns = tuple(entry)
                        self._offsets.append(offset)
                        self._numbers.append(number)
                    offset += len(line)
        except OSError as error:
            raise InputError(f"{self.name!r} cannot be read: {error.strerror}; check its permissions") from None

    def __len__(self) -> int:
        return len(self._offsets)

    def rows(self, start: int = 0) -> Iterator[Row]:
        """All rows from `start` on."""
        if start >= len(self):
            return
        with self.file.open("rb") as lines:
            lines.seek(self._offsets[start])
            index = start
            for line in lines:
                if line.strip() and index < len(self):
                    yield self._form(index, line)
                    index += 1

    def row(self, index: int) -> Row:
        """One row."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        with self.file.open("rb") as lines:
            lines.seek(self._offsets[index])
            return self._form(index, lines.readline())

    def state(self) -> str:
        """Digest of the file and of every image it names."""
        images = (image for row in self.rows() for image in row.images if isinstance(image, Path))
        return digest_files(self.folder, (file for files in ((self.file,), images) for file in files))

    def _form(self, index: int, line: bytes) -> Row:
        name = f"{self.file.name} line {self._numbers[index]}"
        entry = parse_line(line)
        if isinstance(entry, str):
            return unformed(index, name, "bad_json", entry)
        keys, rewards = next(
            (layout for layout in _LAYOUTS if any(_has(entry, key) for key in layout[0])), _LAYOUTS[-1]
        )
        caption = next((key for key in _CAPTIONS if key in entry), None)
        labelled = keys != ("jpg_0", "jpg_1") or "label_0" in entry
        if caption is None or not labelled or not all(_has(entry, key) for key in keys):
            missing = [] if caption else ["caption"]
            missing += [] if labelled else ["label_0"]
            missing += [key for key in keys if not _has(entry, key)]
            return unformed(index, name, "missing_column", _told(missing, list(entry)))
        files: list[Any] = [entry.get(key, entry.get(f"{key}_file_name")) for key in keys]
        for key, file in zip(keys, files, strict=True):
            if not isinstance(file, str) or not file:
                return unformed(index, name, "missing_column", f"{key} is {str(file)[:60]!r}, not a file name")
        label = {"winner": 1, "jpg_0": entry.get("label_0"), "file_name": None}[keys[0]]
        found_rewards = tuple(entry.get(key) for key in rewards)
        known = None if all(reward is None for reward in found_rewards) else found_rewards
        return Row(index, name, entry[caption], tuple(self.folder / file for file in files), label, known, None)


def _told(missing: list[str], found: list[str]) -> str:
    likely = [column for column in (likely_column(name, found) for name in missing) if column]
    asked = f"; did you mean {' and '.join(map(repr, likely))}?" if likely else ""
    verb = "is" if len(missing) == 1 else "are"
    has = ", ".join(map(repr, found[:20])) or "nothing"
    return f"{' and '.join(missing)} {verb} missing{asked}; has {has}; it needs {_WANTED}"


def _has(entry: dict[str, Any], key: str) -> bool:
    return key in entry or f"{key}_file_name" in entry


def parse_line(line: bytes) -> dict[str, Any] | str:
    """The object of a line, or what is wrong with it."""
    try:
        entry = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return "is not UTF-8 text"
    except (ValueError, RecursionError) as error:
        return f"is not JSON ({error})"
    return entry if isinstance(entry, dict) else f"is a JSON {type(entry).__name__}, not an object"
