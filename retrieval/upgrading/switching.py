"""The end of an upgrade, one way or the other: the new encoder takes over, or everything is as before."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from mmalign.errors import IndexDamagedError, InputError
from mmalign.files import whole_folder
from mmalign.progress import progress_bar

from ..draft import Draft
from ..finishing import finish
from ..folder_state import MAPPED, without_mapped
from ..part import Part
from ..roots import resolve_roots, store_roots
from ..storage import Manifest, Store, Writer
from .checking import prepare
from .embedding import RowOfItem, changing
from .measuring import forward_map, least_pairs
from .part import UpgradePart, new_rows

__all__ = ["GONE", "archives_of", "finish_upgrade", "roll_back"]

GONE = ("map", "drop")
MOST_PAIRS = 20_000
MOST_DROPPED = 0.2
_PIECE = 65_536
_ARCHIVE = re.compile(r"archive-\d{6}|\.archive-\d{6}-[0-9a-f]{12}")


def finish_upgrade(store: Store, *, gone: str, keep_old: bool, force: bool, progress: bool) -> Path | None:
    """See `IndexUpgrade.finish`."""
    with changing(store, None) as draft:
        part = draft.upgrade
        assert part is not None
        moved = part.moved(draft.rows)
        alive = draft.alive()
        _require_done(draft, part, alive & ~moved)
        if not force:
            prepare(draft, part)
            _require_better(part)
            if gone == "drop":
                _require_few(part, int(alive.sum()))
        if gone == "drop":
            alive &= moved
        elif (alive & ~moved).any():
            _require_pairs(draft, part, int((alive & moved).sum()))
        _clear_archives(store, draft.manifest)
        archive = _archive(store, draft.manifest) if keep_old else None
        before = draft.manifest.get("upgraded")
        draft.manifest["upgraded"] = {
            "from": draft.manifest["encoder"]["spec"],
            "archive": archive.name if archive else None,
            "generation": draft.writer.generation,
            "earlier": archives_of(before),
        }
        _switch(draft, part, alive, moved, progress)
        finish(draft, None, progress=progress)
    return archive


def roll_back(store: Store, *, force: bool = False) -> None:
    """See `IndexUpgrade.roll_back`."""
    with store.write(wait=True) as writer:
        manifest = store.read_unchecked()
        if manifest.get("upgrade"):
            manifest["upgrade"] = None
            draft = Draft(writer, manifest)
            draft.touch()
            draft.checkpoint()
            _clear_archives(store, draft.manifest)
            return
        about = manifest.get("upgraded")
        archive = store.folder / about["archive"] if about and about["archive"] else None
        if archive is None or not archive.is_dir():
            raise InputError(
                "no upgrade of this index is under way, and none is archived; there is nothing to roll back"
            )
        if about and about["generation"] != manifest["generation"] and not force:
            raise InputError(
                "the index has been written since the upgrade was finished; what was added, removed or changed would "
                f"be lost. Use --force (force=True) to go back all the same, or open {str(archive)!r}, which is the "
                "index as it was"
            )
        _restore(writer, Store(archive))
        _clear_archives(store, store.read_manifest())


def archives_of(about: dict[str, Any] | None) -> list[str]:
    """Archives that a manifest's entry `upgraded` knows of, the newest first."""
    return [name for name in (about["archive"], *about["earlier"]) if name] if about else []


def _require_done(draft: Draft, part: UpgradePart, remaining: Bool[np.ndarray, " rows"]) -> None:
    if part.about["stage"] != "running":
        raise InputError("the upgrade has not been started; `mmalign upgrade INDEX --to ENCODER` does")
    row_of = RowOfItem(draft.stored_items())
    known = [row for entry in part.left_out if (row := row_of(entry["id"], entry["sha256"])) is not None]
    remaining = remaining.copy()
    remaining[known] = False
    if count := int(remaining.sum()):
        raise InputError(
            f"{count:,} images have not been embedded yet; `mmalign upgrade INDEX` goes on with it, then finish"
        )


def _require_better(part: UpgradePart) -> None:
    for kind, figures in part.about["checked"].items():
        if "old" in figures and "merged" in figures and figures["merged"] < figures["old"]:
            new, old = (f"R@1 {figures[m][0]:.3f}, R@10 {figures[m][1]:.3f}" for m in ("merged", "old"))
            raise InputError(
                f"{kind} queries of the support set find less with the new encoder ({new}) than with the old one "
                f"({old}); --roll-back keeps the old one, --force switches all the same"
            )


def _require_few(part: UpgradePart, images: int) -> None:
    missing = len(part.left_out)
    if missing > 10 and missing > MOST_DROPPED * images:
        raise InputError(
            f"{missing:,} of {images:,} images could not be embedded and would be dropped; is a disk away? If they are "
            "gone for good, use --force (force=True)"
        )


def _require_pairs(draft: Draft, part: UpgradePart, pairs: int) -> None:
    least = least_pairs(draft.dim, part.dim)
    if pairs < least:
        raise InputError(
            f"{len(part.left_out):,} images could not be embedded (`mmalign upgrade INDEX --left-out`), and {pairs:,} "
            f"that could are too few to map the others' old vectors by ({least:,}); restore the files and go on, or "
            "remove them from the index with --gone drop (gone='drop')"
        )


def _switch(
    draft: Draft,
    part: UpgradePart,
    kept: Bool[np.ndarray, " rows"],
    moved: Bool[np.ndarray, " rows"],
    progress: bool,
) -> None:
    """Make the draft one of the new encoder: one row for each old row that is kept, in their order."""
    old, new = draft.vectors(), part.vectors()
    draft.writer.require_intact(draft.manifest, [segment["file"] for segment in part.segments])
    new_row = new_rows(part.places, len(old))
    rows = np.flatnonzero(kept)
    mapped = kept & ~moved
    if mapped.any():
        draft.writer.require_intact(draft.manifest, [segment["file"] for segment in draft.part.segments])
    manifest = draft.manifest
    fresh = {name: part.about[name] for name in ("encoder", "queries")}
    fresh |= {"segments": [], "rows": 0, "faiss": None, "calibration": None, "measured": {}}
    manifest.update(fresh)
    draft.part = Part(draft.writer, manifest)
    with progress_bar("switching", len(rows), unit="vectors", enabled=progress) as advance:

        def pieces() -> Iterator[np.ndarray]:
            fit = _pairs(rows[moved[rows]])
            apply = forward_map(old.gather(fit), new.gather(new_row[fit])) if mapped.any() else None
            for start in range(0, len(rows), _PIECE):
                some = rows[start : start + _PIECE]
                renewed = new_row[some] >= 0
                out = np.empty((len(some), new.dim), np.float32)
                out[renewed] = new.gather(new_row[some[renewed]])
                if apply is not None:
                    out[~renewed] = apply(old.gather(some[~renewed]))
                yield out
                advance(len(some))

        draft.part.stream_rows(pieces(), len(rows))
    items = draft.items
    items.keep(kept[np.array(items.row, np.int64)])
    number = np.cumsum(kept) - 1
    for place, row in enumerate(items.row):
        flags = without_mapped(items.flags[place])
        items.flags[place] = ",".join(filter(None, (flags, MAPPED))) if mapped[row] else flags
        items.row[place] = int(number[row])
    draft.upgrade = None
    manifest["upgrade"] = None
    draft.touch()


def _pairs(rows: Int[np.ndarray, " n"]) -> Int[np.ndarray, " pairs"]:
    """At most so many, evenly spread."""
    return rows[np.linspace(0, len(rows) - 1, min(len(rows), MOST_PAIRS)).astype(np.int64)]


def _archive(store: Store, manifest: Manifest) -> Path:
    """The index as it is without the upgrade, as an index of its own inside the folder; its files are linked."""
    target = store.folder / f"archive-{manifest['generation']:06d}"
    roots = store_roots(resolve_roots(manifest["roots"], store.folder), target)
    remedy = "make room, or finish without an archive (--delete-old)"
    with whole_folder(target, remedy=remedy) as fresh, Store(fresh).create() as writer:
        writer.publish(*writer.adopt({**manifest, "upgrade": None, "roots": roots}, store.folder))
    return target


def _clear_archives(store: Store, manifest: Manifest) -> None:
    """Remove archives that belong to no manifest, whole or half: of runs that were stopped. They hold disk space."""
    known = archives_of(manifest.get("upgraded"))
    for path in store.folder.iterdir():
        if _ARCHIVE.fullmatch(path.name) and path.name not in known:
            shutil.rmtree(path, ignore_errors=True)


def _restore(writer: Writer, archive: Store) -> None:
    manifest = archive.read_manifest()
    for name, problem in archive.check_contents(manifest):
        if problem:
            raise IndexDamagedError(
                f"archive {str(archive.folder)!r} is damaged: {name} {problem}; nothing was changed, the index stays "
                "as it is"
            )
    roots = store_roots(resolve_roots(manifest["roots"], archive.folder), writer.folder)
    writer.publish(*writer.adopt({**manifest, "roots": roots}, archive.folder))
