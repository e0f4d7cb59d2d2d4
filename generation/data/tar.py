"""Webdataset tars of captioned images: members of one stem, side by side, are a row."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from mmalign.errors import InputError, reason_of

from .folder import parse_line
from .rows import Kind, Row, unformed
from .sources import RowSource, digest_files

__all__ = ["TarSource"]

_IMAGES = ("jpg", "jpeg", "png", "webp")
_CAPTIONS = ("caption", "text")


@dataclass(frozen=True, slots=True)
class _Member:
    offset: int
    size: int
    ending: str


@dataclass(frozen=True, slots=True)
class _Entry:
    file: int
    name: str
    members: tuple[_Member, ...]


class TarSource(RowSource):
    """Rows of one or more tar files: `KEY.jpg` (or .jpeg, .png, .webp) with `KEY.txt`, or `KEY.json` with a caption.

    What a JSON says counts before a text: an object with `caption` (or `text`), and perhaps a number `reward`. The key
    ends at the first dot of the file's name; other members of a key are not read. Tars are read where they lie, by
    the places of their members.

    Raises:
        InputError: a file is no whole, uncompressed tar, or none has an image.
    """

    kind: Kind | None = "images"

    def __init__(self, folder: Path, files: list[Path]) -> None:
        self.folder, self._files = folder, files
        self.name = str(files[0] if len(files) == 1 else folder)
        self._rows = [entry for number, path in enumerate(files) for entry in _entries(number, path)]
        endings = {member.ending for entry in self._rows for member in entry.members}
        self.columns = tuple(sorted(endings))
        if not endings & set(_IMAGES):
            found = ", ".join(self.columns[:20]) or "nothing"
            raise InputError(f"{self.name!r} has no image named KEY.jpg, .png or .webp; found {found}; give other tars")

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self, start: int = 0) -> Iterator[Row]:
        """All rows from `start` on."""
        return map(self.row, range(start, len(self)))

    def row(self, index: int) -> Row:
        """One row."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        entry = self._rows[index]
        path = self._files[entry.file]
        name = f"{path.relative_to(self.folder).as_posix()} {entry.name}"
        images = [member for member in entry.members if member.ending in _IMAGES]
        if len(images) > 1:
            return unformed(index, name, "ambiguous", f"has {len(images)} images: leave one")
        wanted = {member.ending: member for member in (*images, *_texts(entry))}
        try:
            with path.open("rb") as file:
                contents = {ending: _read(file, member) for ending, member in wanted.items()}
        except OSError as error:
            return unformed(index, name, "unreadable", f"the tar cannot be read here ({reason_of(error)})")
        caption, reward = None, None
        if "json" in contents:
            about = parse_line(contents["json"])
            if isinstance(about, str):
                return unformed(index, name, "bad_json", f"its .json {about}")
            caption = next((about[key] for key in _CAPTIONS if key in about), None)
            reward = about.get("reward")
        if caption is None and "txt" in contents:
            caption = contents["txt"].decode("utf-8-sig", errors="surrogateescape").strip()
        if caption is None:
            return unformed(index, name, "missing_column", "has neither a .txt nor a .json with a caption")
        image = contents[images[0].ending] if images else None
        return Row(index, name, caption, (image,), None, None if reward is None else (reward,), None)

    def state(self) -> str:
        """Digest of the tars."""
        return digest_files(self.folder, self._files)


def _texts(entry: _Entry) -> list[_Member]:
    return [member for member in entry.members if member.ending in ("txt", "json")]


def _read(file: BinaryIO, member: _Member) -> bytes:
    file.seek(member.offset)
    content = file.read(member.size)
    if len(content) < member.size:
        raise OSError("it ends too early")
    return content


def _entries(number: int, path: Path) -> Iterator[_Entry]:
    """The rows of a tar by its headers; what is neither image nor text, or stored with holes, is skipped."""
    try:
        with tarfile.open(path, "r:") as opened:
            members = [member for member in opened if member.isfile() and not member.issparse()]
        size = path.stat().st_size
        if any(member.size < 0 or member.offset_data + member.size > size for member in members):
            raise tarfile.ReadError("it ends too early, or a header lies about a size")
    except (OSError, tarfile.TarError) as error:
        raise InputError(
            f"{str(path)!r} is not a whole, uncompressed tar ({reason_of(error)}); fetch it again, or unpack .gz"
        ) from None
    for key, group in groupby(members, key=lambda member: _key(member.name)):
        found = [_Member(m.offset_data, m.size, _ending(m.name)) for m in group]
        if any(member.ending in (*_IMAGES, "txt", "json") for member in found):
            yield _Entry(number, key, tuple(found))


def _key(name: str) -> str:
    path = PurePosixPath(name)
    return (path.parent / path.name.partition(".")[0]).as_posix()


def _ending(name: str) -> str:
    return PurePosixPath(name).name.partition(".")[2].lower()
