"""From folders of images to the next generation of their index: only what changed is read, decoded and encoded."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
from torch import Tensor

from mmalign.encoders import Encoder
from mmalign.encoders.stream import encode_stream
from mmalign.errors import InputError
from mmalign.imaging import DecodeSettings, read_file
from mmalign.progress import progress_bar

from .draft import Draft
from .finishing import finish
from .folder_state import FolderState, Loaded
from .metadata import find_metadata, join_metadata, merge_metadata, read_metadata
from .options import UpdateOptions, faiss_options, remembered
from .report import UpdateReport
from .roots import names_of
from .scan import FoundFile, ScanResult, ScanSettings, scan

__all__ = ["add_images", "update_folders"]


def update_folders(
    draft: Draft, encoder: Callable[[], Encoder], roots: Sequence[tuple[int, Path]], options: UpdateOptions
) -> UpdateReport:
    """Bring a draft in line with folders, given with their numbers, then finish it.

    Interrupting it, in whatever way, loses at most the work since the last checkpoint.

    Args:
        draft: what to bring up to date.
        encoder: gives the encoder; asked only if there is something to encode.
        roots: number and place of each folder.
        options: as checked by `retrieval.options.checked_options`.

    Raises:
        InputError: a folder is missing, holds no image at all, or none that can be read; or FAISS cannot do what it is
            asked for.
    """
    started = time.perf_counter()
    draft.settings["decode"] = asdict(remembered(DecodeSettings, draft.settings["decode"], options))
    report = UpdateReport()
    skipped_before = set(map(_known_by, draft.skipped))
    for number, root in roots:
        report += _update_folder(draft, encoder, root, number, options)
        draft.checkpoint()
    report.newly_skipped = [entry for entry in report.skipped if _known_by(entry) not in skipped_before]
    finish(draft, encoder, faiss_options(options), progress=options.get("progress", False))
    report.seconds = time.perf_counter() - started
    return report


def _known_by(skipped: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(skipped[name] for name in ("root", "path", "reason", "size", "mtime_ns"))


def _update_folder(
    draft: Draft, encoder: Callable[[], Encoder], root: Path, number: int, options: UpdateOptions
) -> UpdateReport:
    report = UpdateReport()
    scanning = remembered(ScanSettings, draft.settings["scan"].get(str(number), {}), options)
    draft.settings["scan"][str(number)] = scanning.to_dict()
    allow_removals = options.get("allow_removals", False)
    found = scan(root, scanning, skip=draft.folder)
    state = FolderState(draft, number, found, report)
    if not found.files:
        _refuse_empty(root, state.known, scanning, allow_removals)
    columns = _read_metadata(draft, root, number, options.get("metadata"), report)
    todo = state.triage()
    draft.unfinished[str(number)] = len(found.files)
    if todo:
        _encode(draft, encoder(), root, state, todo, options)
    state.remove_missing(allow_removals)
    if not len(draft.items) and found.files:
        first = report.skipped[0] if report.skipped else draft.skipped[0]
        raise InputError(
            f"none of the {len(found.files)} image files in {str(root)!r} can be read; the first: {first['message']}"
        )
    if columns is not None:
        _apply_metadata(draft, number, *columns, report)
    del draft.unfinished[str(number)]
    return report


def _encode(
    draft: Draft, encoder: Encoder, root: Path, state: FolderState, todo: list[FoundFile], options: UpdateOptions
) -> None:
    report = state.report
    started = time.perf_counter()
    encoder.require("image")
    stream = encode_stream(
        encoder,
        todo,
        _loader(encoder, os.fsencode(root), state),
        batch_size=options.get("batch_size"),
        workers=options.get("workers"),
    )
    with progress_bar("indexing", len(todo), enabled=options.get("progress", False), skipped=0) as advance:
        settled = True
        try:
            for batch in stream:
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
    report.encoding_seconds = time.perf_counter() - started


def add_images(
    draft: Draft, encoder: Callable[[], Encoder], paths: Sequence[str | os.PathLike[str]], *, progress: bool = False
) -> list[int]:
    """Enter single files; a file below no indexed folder is entered by its absolute path. Returns their ids in order.

    Raises:
        UnreadableImageError: one of them cannot be read; the draft must then be dropped.
    """
    encoder().require("image")
    roots = draft.roots()
    by_root: dict[int, dict[bytes, list[int]]] = {}
    for position, path in enumerate(paths):
        number, name = names_of(path, roots)[0]
        by_root.setdefault(number, {}).setdefault(name, []).append(position)
    ids = [-1] * len(paths)
    with progress_bar("adding", len(paths), enabled=progress) as advance:
        for number, positions_of in by_root.items():
            root = os.fsencode(roots[number]) if number >= 0 else b""
            # Size and time of -1 differ from any stored ones, so every file is opened and judged by content.
            found = ScanResult([FoundFile(name, -1, -1) for name in positions_of])
            state = FolderState(draft, number, found, UpdateReport())
            state.missing, state.missing_by_hash = {}, {}
            for batch in encode_stream(encoder(), found.files, _loader(encoder(), root, state)):
                failure = next((outcome.error for outcome in batch.outcomes if outcome.error), None)
                if failure is not None:
                    raise failure
                state.take(batch.outcomes, batch.vectors)
                advance(len(batch.outcomes))
            for name, positions in positions_of.items():
                for position in positions:
                    ids[position] = draft.items.id[state.known[name]]
    return ids


def _refuse_empty(root: Path, known: dict[bytes, int], scanning: ScanSettings, allow_removals: bool) -> None:
    if known and not allow_removals:
        raise InputError(
            f"{str(root)!r} holds no image any more, the index has {len(known)} from there; is its disk mounted? "
            "Nothing was removed. If they are gone for good, use --allow-removals (allow_removals=True)"
        )
    if not known and scanning.shard is None:
        raise InputError(
            f"{str(root)!r} holds no file with an image suffix; give a folder of images, or --all-files "
            "(all_files=True) to look at every file's content"
        )


def _loader(encoder: Encoder, root: bytes, state: FolderState) -> Callable[[FoundFile], tuple[Loaded, Tensor | None]]:
    decode = state.draft.decode

    def load(found: FoundFile) -> tuple[Loaded, Tensor | None]:
        content = read_file(os.fsdecode(os.path.join(root, found.path)))
        if bytes.fromhex(content.sha256) in state.row_of_hash or found.path in state.imported:
            return Loaded(content), None
        image, pixels = encoder.load_image(content, decode)
        return Loaded(content, image.width, image.height, image.format, ",".join(image.flags)), pixels

    return load


def _read_metadata(
    draft: Draft, root: Path, root_number: int, given: str | os.PathLike[str] | None, report: UpdateReport
) -> tuple[pa.Table, Path, bool] | None:
    """The user's columns: from the file given now or in an earlier run, else from `metadata.csv` and its like.

    Read before anything is encoded. A file that was given must fit; one that merely lies in the folder need not.
    """
    remembered = draft.settings["metadata"]
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
    ids = {p: i for p, i, r in zip(items.raw_name, items.id, items.root, strict=True) if r == root_number}
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
