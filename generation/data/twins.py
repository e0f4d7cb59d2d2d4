"""Twin folders: `winner/` and `loser/` hold images of equal names, captions are texts beside them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mmalign.errors import InputError

from .folder import parse_line
from .rows import Row, unformed
from .sources import RowSource, digest_files, walk

__all__ = ["TwinSource"]

_NO_IMAGES = frozenset({".txt", ".json", ".jsonl", ".csv", ".caption"})


class TwinSource(RowSource):
    """Pairs of `winner/NAME.*` and `loser/NAME.*`, at any depth, in order of their names; suffixes may differ.

    The caption of NAME is the text of `winner/NAME.txt`, else of `captions/NAME.txt`, without white space around it,
    else that of the line `{"file": "NAME", "caption": ...}` (or with a suffix) in `captions.jsonl`.
    """

    kind = "pairs"

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, str(folder)
        self._winners, self._losers = (_by_stem(folder / name) for name in ("winner", "loser"))
        self._stems = sorted(self._winners.keys() | self._losers.keys())
        self._captions, self._unread = self._read_captions(folder / "captions.jsonl")

    def __len__(self) -> int:
        return len(self._stems)

    def rows(self, start: int = 0) -> Iterator[Row]:
        """All rows from `start` on."""
        return map(self.row, range(start, len(self)))

    def row(self, index: int) -> Row:
        """One row."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        stem = self._stems[index]
        winners, losers = self._winners.get(stem, []), self._losers.get(stem, [])
        name = (winners or losers)[0].relative_to(self.folder).as_posix()
        if not winners or not losers:
            absent = "loser" if winners else "winner"
            return unformed(index, name, "no_partner", f"has no partner {absent}/{stem}.*")
        for files in (winners, losers):
            if len(files) > 1:
                several = " and ".join(file.relative_to(self.folder).as_posix() for file in files)
                return unformed(index, name, "ambiguous", f"{several} have the same name but for the suffix")
        caption = self._caption(stem, winners[0])
        if caption is None:
            places = f"winner/{stem}.txt, captions/{stem}.txt and captions.jsonl"
            return unformed(index, name, "empty_caption", f"has no caption in {places}{self._unread}")
        return Row(index, name, caption, (winners[0], losers[0]), 1, None, None)

    def state(self) -> str:
        """Digest of all files in the folders and of the captions."""
        parts = [file for name in ("winner", "loser", "captions") for file in walk(self.folder / name)]
        return digest_files(self.folder, [*parts, self.folder / "captions.jsonl"])

    def _caption(self, stem: str, winner: Path) -> object:
        for place in (winner.parent / f"{Path(stem).name}.txt", self.folder / "captions" / f"{stem}.txt"):
            try:
                data = place.read_bytes()
            except OSError:
                continue
            try:
                return data.decode("utf-8-sig").strip()
            except UnicodeDecodeError:
                return data
        return next((self._captions[key] for key in (stem, f"{stem}{winner.suffix}") if key in self._captions), None)

    @staticmethod
    def _read_captions(file: Path) -> tuple[dict[str, object], str]:
        """Captions by file or stem, and a remark on lines that are not of the form."""
        captions: dict[str, object] = {}
        unread = []
        try:
            lines = file.read_bytes().splitlines() if file.exists() else []
        except OSError as error:
            raise InputError(f"{str(file)!r} cannot be read: {error.strerror}; check its permissions") from None
        for number, line in enumerate(lines, 1):
            entry = parse_line(line) if line.strip() else {}
            if isinstance(entry, dict) and "caption" in entry:
                captions[str(entry.get("file", entry.get("file_name"))).removeprefix("winner/")] = entry["caption"]
            elif line.strip():
                unread.append(str(number))
        listed = ", ".join(unread[:5]) + (", ..." if len(unread) > 5 else "")
        return captions, f" (where line {listed} is no object with file and caption)" if unread else ""


def _by_stem(folder: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for file in walk(folder):
        if file.suffix.lower() not in _NO_IMAGES:
            found.setdefault(file.relative_to(folder).with_suffix("").as_posix(), []).append(file)
    return found
