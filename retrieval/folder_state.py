"""Where every known path and content of one folder stands while an update runs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmalign.encoders.stream import Outcome
from mmalign.errors import UnreadableImageError
from mmalign.imaging import FileContent

from .draft import Draft
from .items import NO_HASH, display_path
from .report import UpdateReport
from .scan import FoundFile, ScanResult

__all__ = ["MAPPED", "FolderState", "Loaded", "without_mapped"]

# Among an item's flags: its vector was brought over from an old encoder, the file itself was never read by this one.
MAPPED = "mapped"

# Reasons that lie in the content: such a file is tried again only when its size or time has changed.
_LASTING_REASONS = frozenset({"empty", "not_an_image", "truncated", "corrupt", "too_large"})
# Reasons for which what the index has of a file is certainly not what the file holds now.
_REPLACED_REASONS = _LASTING_REASONS | {"unsupported", "no_vector"}


def without_mapped(flags: str) -> str:
    """An item's flags, as they are once its vector is of its own file."""
    return ",".join(flag for flag in flags.split(",") if flag != MAPPED)


@dataclass(frozen=True)
class Loaded:
    """A file that was read; width, height, format and flags only if it had to be decoded."""

    content: FileContent
    width: int = 0
    height: int = 0
    format: str = ""
    flags: str = ""


class FolderState:
    """Where every known path and content stands while an update runs."""

    def __init__(self, draft: Draft, root: int, found: ScanResult, report: UpdateReport) -> None:
        self.draft, self.root, self.found, self.report = draft, root, found, report
        items = draft.items
        self.known = {
            path: place
            for place, (path, owner) in enumerate(zip(items.raw_name, items.root, strict=True))
            if owner == root
        }
        mapped = [MAPPED in flags.split(",") for flags in items.flags]
        self.mapped = {place for place, one in enumerate(mapped) if one}
        # A content whose vector was only mapped is to be encoded where a file has it.
        self.row_of_hash: dict[bytes, int] = {
            digest: row for digest, row, one in zip(items.sha256, items.row, mapped, strict=True) if not one
        }
        self.place_of_hash: dict[bytes, int] = {digest: place for place, digest in enumerate(items.sha256)}
        self.known_before = len(self.known)
        present = {file.path for file in found.files} | found.closed_files
        closed = tuple(folder + b"/" for folder in found.closed_folders if folder)
        self.missing = {
            path: place
            for path, place in self.known.items()
            if path not in present and not (closed and path.startswith(closed))
        }
        self.missing_by_hash: dict[bytes, list[bytes]] = {}
        for path, place in self.missing.items():
            self.missing_by_hash.setdefault(items.sha256[place], []).append(path)
        # Vectors imported without files carry no hash: the file now found under that name is taken to be theirs.
        self.imported = {
            path for path, place in self.known.items() if items.sha256[place] == NO_HASH and place not in self.mapped
        }
        # What is known of contents whose item has been given other content in this run.
        self.about_of_hash: dict[bytes, tuple[int, int, str, str]] = {}
        self.dropped: set[int] = set()

    def triage(self) -> list[FoundFile]:
        """Files worth opening: new, of another size or time than known, or bad when they were decoded another way."""
        items, draft = self.draft.items, self.draft
        retry = draft.first_settings["decode"] != draft.settings["decode"]
        mine = [entry for entry in draft.skipped if entry["root"] == self.root]
        others = [entry for entry in draft.skipped if entry["root"] != self.root]
        before = {os.fsencode(entry["path"]): entry for entry in mine}
        todo, kept = [], []
        for file in self.found.files:
            place = self.known.get(file.path)
            as_known = place is not None and (items.size[place], items.mtime_ns[place]) == (file.size, file.mtime_ns)
            if as_known and place not in self.mapped:
                self.report.unchanged += 1
                continue
            entry = before.get(file.path)
            if (
                entry is not None
                and not retry
                and entry["reason"] in _LASTING_REASONS
                and (entry["size"], entry["mtime_ns"]) == (file.size, file.mtime_ns)
            ):
                kept.append(entry)
                if place is not None:  # a run that was stopped before it dropped the item
                    self.dropped.add(place)
                continue
            todo.append(file)
        draft.skipped = others + kept
        self.report.skipped.extend(kept)
        for path, reason, message in self.found.problems:
            self._skip(path, reason, f"{display_path(path)}: {message}", 0, 0)
        return todo

    def take(self, outcomes: list[Outcome[FoundFile, Loaded]], vectors: Any) -> None:
        """Enter a batch, in the order of the files."""
        wanted: list[int] = []
        first = self.draft.rows
        # An encoder in half precision can overflow.
        sound = np.isfinite(vectors).all(axis=1) & (np.abs(vectors).max(axis=1, initial=0) > 0)
        outcomes = [self._judged(outcome, sound) for outcome in outcomes]
        for outcome in outcomes:
            if outcome.vector is not None and outcome.payload is not None:
                digest = bytes.fromhex(outcome.payload.content.sha256)
                # Equal files can be decoded side by side before either is known: the first one gives the vector.
                if digest not in self.row_of_hash:
                    self.row_of_hash[digest] = first + len(wanted)
                    wanted.append(outcome.vector)
        self.draft.add_rows(vectors[wanted])
        for outcome in outcomes:
            if outcome.error is not None:
                file = outcome.source
                self._skip(file.path, outcome.error.reason, str(outcome.error), file.size, file.mtime_ns)
                continue
            assert outcome.payload is not None
            self._enter(outcome.source.path, outcome.payload)

    @staticmethod
    def _judged(outcome: Outcome[FoundFile, Loaded], sound: np.ndarray) -> Outcome[FoundFile, Loaded]:
        if outcome.vector is None or sound[outcome.vector]:
            return outcome
        message = f"{display_path(outcome.source.path)}: the encoder gives no finite vector for it"
        return Outcome(outcome.source, error=UnreadableImageError("no_vector", message))

    def _enter(self, path: bytes, loaded: Loaded) -> None:
        items, content = self.draft.items, loaded.content
        digest = bytes.fromhex(content.sha256)
        place = self.known.get(path)
        self.draft.touch()
        if place is not None and items.sha256[place] in (digest, NO_HASH):  # touched or adopted, not changed
            items.size[place], items.mtime_ns[place] = content.size, content.mtime_ns
            items.sha256[place] = digest
            if place in self.mapped:
                items.row[place] = self.row_of_hash[digest]
                items.flags[place] = without_mapped(items.flags[place])
                self.mapped.discard(place)
            self.report.unchanged += 1
            return
        like = self.place_of_hash.get(digest)
        if loaded.format or like is None:
            about = loaded.width, loaded.height, loaded.format, loaded.flags
        else:
            about = self.about_of_hash.get(digest) or self._about(like)
        values = {
            "row": self.row_of_hash[digest],
            "root": self.root,
            "raw_name": path,
            "size": content.size,
            "mtime_ns": content.mtime_ns,
            "sha256": digest,
            **dict(zip(("width", "height", "format", "flags"), about, strict=True)),
        }
        gone = self.missing_by_hash.get(digest)
        if place is not None:
            self._overwrite(place, values)
            self.report.changed += 1
        elif gone:
            place = self.missing.pop(gone.pop())
            self._overwrite(place, values)
            self.report.moved += 1
        else:
            place = len(items)
            self.draft.add_item(**values)
            if like is None:
                self.report.added += 1
            else:
                self.report.aliases += 1
        self.known[path] = place
        self.place_of_hash.setdefault(digest, place)

    def _about(self, place: int) -> tuple[int, int, str, str]:
        items = self.draft.items
        return items.width[place], items.height[place], items.format[place], without_mapped(items.flags[place])

    def _overwrite(self, place: int, values: dict[str, Any]) -> None:
        self.about_of_hash.setdefault(self.draft.items.sha256[place], self._about(place))
        for name, value in values.items():
            getattr(self.draft.items, name)[place] = value

    def _skip(self, path: bytes, reason: str, message: str, size: int, mtime_ns: int) -> None:
        entry = {
            "root": self.root,
            "path": os.fsdecode(path),
            "reason": reason,
            "message": message,
            "size": size,
            "mtime_ns": mtime_ns,
        }
        self.report.skipped.append(entry)
        self.draft.skipped.append(entry)
        place = self.known.get(path)
        if place is not None and reason in _REPLACED_REASONS:
            self.dropped.add(place)

    def remove_missing(self, allow: bool) -> None:
        """Drop items whose files are gone, unless so many are that a missing disk is likelier."""
        gone = set(self.missing.values())
        if not allow and len(gone) > 10 and len(gone) > self.known_before / 2:
            self.report.withheld_removals = len(gone)
            gone = set()
        doomed = gone | self.dropped
        if doomed:
            self.draft.items.keep([place not in doomed for place in range(len(self.draft.items))])
            self.draft.touch()
        self.report.removed = len(doomed)
