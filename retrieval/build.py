"""From a folder of images to the next generation of its index: only what changed is read, decoded and encoded."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from mmalign.encoders import Encoder
from mmalign.encoders.stream import Outcome, encode_stream
from mmalign.errors import InputError, UnreadableImageError
from mmalign.imaging import FileContent, read_file, read_image
from mmalign.progress import progress_bar

from .draft import Draft
from .items import NO_HASH, display_path
from .metadata import find_metadata, join_metadata, merge_metadata, read_metadata
from .scan import FoundFile, ScanResult, scan

__all__ = ["DecodeSettings", "ScanSettings", "UpdateReport", "add_images", "update_folder"]

# Reasons that lie in the content: such a file is tried again only when its size or time has changed.
_LASTING_REASONS = frozenset({"empty", "not_an_image", "truncated", "corrupt", "too_large"})
# Reasons for which what the index has of a file is certainly not what the file holds now.
_REPLACED_REASONS = _LASTING_REASONS | {"unsupported", "no_vector"}


@dataclass(frozen=True)
class DecodeSettings:
    """How files become pixels; recorded in the manifest, and queries go the same way.

    Attributes:
        fast_decode: let JPEGs be decoded at reduced size, at least twice the target: faster on large photographs, only
            nearly the same pixels.
        tolerate_truncation: keep images whose end is missing, flagged.
        max_pixels: refuse larger images; `None` is the reader's own limit.
    """

    fast_decode: bool = False
    tolerate_truncation: bool = False
    max_pixels: int | None = None


@dataclass(frozen=True)
class ScanSettings:
    """Which files count; see `retrieval.scan.scan`."""

    follow_links: bool = False
    all_files: bool = False
    hidden: bool = False
    shard: tuple[int, int] | None = None


@dataclass
class UpdateReport:
    """What an update did, in numbers of files.

    Attributes:
        added: new content, encoded.
        changed: known path, new content, encoded.
        moved: known content at a new path whose old path is gone; not encoded.
        aliases: known content at a further path; not encoded.
        removed: gone from the folder.
        withheld_removals: gone, but kept because they are so many that the disk may be missing.
        unchanged: as before.
        skipped: files that could not be read: path, reason, message.
        metadata_unmatched: metadata rows that name no indexed file.
        seconds: for the whole update, FAISS included; 0 until it is done.
        encoded: images that went through the model.
        encoding_seconds: for reading, decoding and encoding.
    """

    added: int = 0
    changed: int = 0
    moved: int = 0
    aliases: int = 0
    removed: int = 0
    withheld_removals: int = 0
    unchanged: int = 0
    skipped: list[dict[str, Any]] = field(default_factory=list)
    metadata_unmatched: int = 0
    seconds: float = 0.0
    encoded: int = 0
    encoding_seconds: float = 0.0

    @property
    def encoded_per_second(self) -> float:
        """Images through the model, over the time that reading, decoding and encoding took."""
        return self.encoded / self.encoding_seconds if self.encoded else 0.0

    def __add__(self, other: UpdateReport) -> UpdateReport:
        return UpdateReport(**{name: value + getattr(other, name) for name, value in vars(self).items()})


@dataclass(frozen=True)
class _Loaded:
    content: FileContent
    width: int = 0
    height: int = 0
    format: str = ""
    flags: str = ""


def update_folder(
    draft: Draft,
    encoder: Encoder,
    root: Path,
    root_number: int,
    *,
    decode: DecodeSettings,
    scanning: ScanSettings,
    batch_size: int | None = None,
    workers: int | None = None,
    allow_removals: bool = False,
    metadata: Path | None = None,
    progress: bool = False,
) -> UpdateReport:
    """Bring the draft in line with a folder, publishing checkpoints on the way.

    Interrupting it, in whatever way, loses at most the work since the last checkpoint.

    Raises:
        InputError: the folder is missing, holds no image at all, or none that can be read.
    """
    report = UpdateReport()
    found = scan(root, **vars(scanning), skip=draft.folder)
    state = _State(draft, root_number, found, report)
    if not found.files:
        _refuse_empty(root, state.known, scanning, allow_removals)
    columns = _read_metadata(draft, root, root_number, metadata, report)
    todo = state.triage(asdict(decode))
    load = _loader(encoder, os.fsencode(root), state, decode)
    loop_started = time.perf_counter()
    with progress_bar("indexing", len(todo), enabled=progress and bool(todo), skipped=0) as advance:
        settled = True
        try:
            for batch in encode_stream(encoder, todo, load, batch_size=batch_size, workers=workers):
                settled = False
                state.take(batch.outcomes, batch.vectors)
                report.encoded += len(batch.vectors)
                draft.checkpoint_if_due()
                settled = True
                advance(len(batch.outcomes), skipped=len(report.skipped))
        except KeyboardInterrupt:
            if settled and draft.worth_keeping:  # not settled: a batch may have been entered by half
                draft.checkpoint()
            raise
    report.encoding_seconds = time.perf_counter() - loop_started
    state.remove_missing(allow_removals)
    if not len(draft.items) and found.files:
        first = report.skipped[0] if report.skipped else draft.skipped[0]
        raise InputError(
            f"none of the {len(found.files)} image files in {str(root)!r} can be read; the first: {first['message']}"
        )
    if columns is not None:
        _apply_metadata(draft, root_number, *columns, report)
    return report


def add_images(
    draft: Draft,
    encoder: Encoder,
    roots: Sequence[Path],
    paths: Sequence[str | os.PathLike[str]],
    *,
    decode: DecodeSettings,
    progress: bool = False,
) -> list[int]:
    """Enter single files; a file below no indexed folder is entered by its absolute path. Returns their ids in order.

    Raises:
        UnreadableImageError: one of them cannot be read; the draft must then be dropped.
    """
    by_root: dict[int, dict[bytes, list[int]]] = {}
    for number, path in enumerate(paths):
        whole = Path(os.path.abspath(path))
        inside = whole.parent.resolve() / whole.name  # a linked file is indexed under its own name
        owner = next((n for n, root in enumerate(roots) if root.resolve() in inside.parents), -1)
        below = whole if owner < 0 else inside.relative_to(roots[owner].resolve())
        by_root.setdefault(owner, {}).setdefault(os.fsencode(below.as_posix()), []).append(number)
    ids = [-1] * len(paths)
    with progress_bar("adding", len(paths), enabled=progress) as advance:
        for owner, numbers in by_root.items():
            root = os.fsencode(roots[owner]) if owner >= 0 else b""
            # Size and time of -1 differ from any stored ones, so every file is opened and judged by content.
            found = ScanResult([FoundFile(path, -1, -1) for path in numbers])
            report = UpdateReport()
            state = _State(draft, owner, found, report)
            state.missing, state.missing_by_hash = {}, {}
            for batch in encode_stream(encoder, found.files, _loader(encoder, root, state, decode)):
                failure = next((outcome.error for outcome in batch.outcomes if outcome.error), None)
                if failure is not None:
                    raise failure
                state.take(batch.outcomes, batch.vectors)
                advance(len(batch.outcomes))
            for raw, positions in numbers.items():
                for position in positions:
                    ids[position] = draft.items.id[state.known[raw]]
    return ids


def _refuse_empty(root: Path, known: dict[bytes, int], scanning: ScanSettings, allow_removals: bool) -> None:
    if known and not allow_removals:
        raise InputError(
            f"{str(root)!r} holds no image any more, the index has {len(known)} from there; is its disk mounted? "
            "Nothing was removed. If they are gone for good, use --allow-removals (allow_removals=True)"
        )
    if not known and scanning.shard is None:
        raise InputError(
            f"{str(root)!r} holds no file with an image suffix; give a folder of images, or --all-files to look at "
            "every file's content"
        )


def _loader(
    encoder: Encoder, root: bytes, state: _State, decode: DecodeSettings
) -> Callable[[FoundFile], tuple[_Loaded, Tensor | None]]:
    preprocessing = encoder.preprocessing
    assert preprocessing is not None
    size = preprocessing.size

    def load(found: FoundFile) -> tuple[_Loaded, Tensor | None]:
        content = read_file(os.fsdecode(os.path.join(root, found.path)))
        if bytes.fromhex(content.sha256) in state.row_of_hash or found.path in state.imported:
            return _Loaded(content), None
        image = read_image(
            content,
            max_pixels=decode.max_pixels,
            fast_decode=size if decode.fast_decode else None,
            tolerate_truncation=decode.tolerate_truncation,
        )
        loaded = _Loaded(content, image.width, image.height, image.format, ",".join(image.flags))
        return loaded, preprocessing(image.pixels)

    return load


class _State:
    """Where every known path and content stands while an update runs."""

    def __init__(self, draft: Draft, root: int, found: ScanResult, report: UpdateReport) -> None:
        self.draft, self.root, self.found, self.report = draft, root, found, report
        items = draft.items
        self.known = {
            path: place
            for place, (path, owner) in enumerate(zip(items.raw_path, items.root, strict=True))
            if owner == root
        }
        self.row_of_hash: dict[bytes, int] = dict(zip(items.sha256, items.row, strict=True))
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
        self.imported = {path for path, place in self.known.items() if items.sha256[place] == NO_HASH}
        # What is known of contents whose item has been given other content in this run.
        self.about_of_hash: dict[bytes, tuple[int, int, str, str]] = {}
        self.dropped: set[int] = set()

    def triage(self, decode: dict[str, Any]) -> list[FoundFile]:
        """Files worth opening: new ones, known ones whose size or time differs, bad ones if `decode` is another now."""
        items, draft = self.draft.items, self.draft
        retry = draft.first_settings.get("decode", decode) != decode
        mine = [entry for entry in draft.skipped if entry["root"] == self.root]
        others = [entry for entry in draft.skipped if entry["root"] != self.root]
        before = {os.fsencode(entry["path"]): entry for entry in mine}
        todo, kept = [], []
        for file in self.found.files:
            place = self.known.get(file.path)
            if place is not None and (items.size[place], items.mtime_ns[place]) == (file.size, file.mtime_ns):
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

    def take(self, outcomes: list[Outcome[FoundFile, _Loaded]], vectors: Any) -> None:
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
    def _judged(outcome: Outcome[FoundFile, _Loaded], sound: np.ndarray) -> Outcome[FoundFile, _Loaded]:
        if outcome.vector is None or sound[outcome.vector]:
            return outcome
        message = f"{display_path(outcome.source.path)}: the encoder gives no finite vector for it"
        return Outcome(outcome.source, error=UnreadableImageError("no_vector", message))

    def _enter(self, path: bytes, loaded: _Loaded) -> None:
        items, content = self.draft.items, loaded.content
        digest = bytes.fromhex(content.sha256)
        place = self.known.get(path)
        self.draft.touch()
        if place is not None and items.sha256[place] in (digest, NO_HASH):  # touched or adopted, not changed
            items.size[place], items.mtime_ns[place] = content.size, content.mtime_ns
            items.sha256[place] = digest
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
            "raw_path": path,
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
        return items.width[place], items.height[place], items.format[place], items.flags[place]

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


def _read_metadata(
    draft: Draft, root: Path, root_number: int, given: Path | None, report: UpdateReport
) -> tuple[pa.Table, Path, bool] | None:
    """The user's columns: from the file given now or in an earlier run, else from `metadata.csv` and its like.

    Read before anything is encoded. A file that was given must fit; one that merely lies in the folder need not.
    """
    remembered = draft.manifest["settings"].setdefault("metadata", {})
    if given is not None:
        remembered[str(root_number)] = os.fspath(Path(given).resolve())
    chosen = remembered.get(str(root_number))
    if given is None and chosen is not None and not Path(chosen).is_file():
        chosen = None
    path = Path(chosen) if chosen is not None else find_metadata(root)
    if path is None:
        return None
    try:
        return read_metadata(path), path, given is not None
    except InputError as error:
        if given is not None:
            raise
        report.skipped.append(_metadata_problem(root_number, path, error))
        return None


def _metadata_problem(root_number: int, path: Path, error: InputError) -> dict[str, Any]:
    about = {"root": root_number, "path": os.fspath(path), "reason": "metadata", "message": str(error)}
    return {**about, "size": 0, "mtime_ns": 0}


def _apply_metadata(
    draft: Draft, root_number: int, table: pa.Table, path: Path, given: bool, report: UpdateReport
) -> None:
    """Join columns to the items of one folder.

    An item keeps the values it has until the file has a row for it: files that were moved are not forgotten because
    the metadata still name their old places.
    """
    items = draft.items
    ids = {p: i for p, i, r in zip(items.raw_path, items.id, items.root, strict=True) if r == root_number}
    stored = draft.metadata()
    joined, report.metadata_unmatched = join_metadata(table, ids)
    if not len(joined) and len(table) and ids and stored is None:
        problem = InputError(
            f"none of the {len(table)} rows of {str(path)!r} names an indexed file; give paths relative to the "
            "indexed folder"
        )
        if given:
            raise problem
        report.skipped.append(_metadata_problem(root_number, path, problem))
    merged = merge_metadata(stored, joined, items.id)
    if merged is not None and (stored is None or not stored.equals(merged)):
        draft.set_metadata(merged)
