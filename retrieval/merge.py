"""Several indexes into one: what `--shard i/n` on many machines ends in."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from mmalign.errors import EncoderMismatchError, InputError
from mmalign.progress import progress_bar

from .draft import Draft
from .index import ImageIndex
from .items import ItemColumns
from .metadata import concat_metadata
from .storage import Store

__all__ = ["merge_indexes"]


def merge_indexes(
    out: str | os.PathLike[str],
    parts: Sequence[str | os.PathLike[str]],
    *,
    factory: str | None = None,
    progress: bool = False,
) -> ImageIndex:
    """Write a new index with the items of all parts. The parts are not changed.

    Files of equal content share one vector; a file that several parts name under the same path is taken once.

    Raises:
        InputError: no parts, or `out` holds an index.
        EncoderMismatchError: the parts were made with different encoders (both named).
    """
    if not parts:
        raise InputError("name the indexes to merge")
    opened = [ImageIndex.open(part) for part in parts]
    first = opened[0].manifest["encoder"]
    for index in opened[1:]:
        other = index.manifest["encoder"]
        if (other.get("fingerprint"), other["dim"]) != (first.get("fingerprint"), first["dim"]):
            raise EncoderMismatchError(
                f"{str(opened[0].store.folder)!r} was made with {first['spec']!r}, {str(index.store.folder)!r} with "
                f"{other['spec']!r}; indexes of different encoders cannot be merged"
            )
    store = Store(Path(out))
    if store.exists():
        raise InputError(f"{str(out)!r} holds an index already; choose another folder")
    roots = list(dict.fromkeys(root for index in opened for root in index.roots))
    with store.write() as writer:
        try:
            draft = Draft.start(store, writer, first, roots)
            draft.manifest["settings"] = {"decode": opened[0].manifest["settings"].get("decode", {})}
            queries = next((q for index in opened if (q := index.snapshot.reference_queries()) is not None), None)
            if queries is not None:
                draft.write_queries(queries)
            tables = []
            with progress_bar("merging", len(opened), unit="indexes", enabled=progress) as advance:
                for index in opened:
                    tables.append(_append(draft, index, roots))
                    advance(1)
            kept = [table for table in tables if table is not None]
            if kept:
                draft.set_metadata(concat_metadata(kept))
            draft.finish(None, factory=factory, progress=progress)
        except BaseException:
            writer.abandon()
            raise
    return ImageIndex(store.folder)


def _append(draft: Draft, index: ImageIndex, roots: list[Path]) -> pa.Table | None:
    known_paths = set(zip(draft.items.root, draft.items.raw_path, strict=True))
    known_rows = dict(zip(draft.items.sha256, draft.items.row, strict=True))
    columns = ItemColumns.of(index.items)
    place_of_root = {number: roots.index(root) for number, root in enumerate(index.roots)}
    new_row: dict[int, int] = {}
    wanted_rows: list[int] = []
    ids: dict[int, int] = {}
    first = draft.rows
    for place in range(len(columns)):
        root = place_of_root.get(columns.root[place], -1)
        path, digest, row = columns.raw_path[place], columns.sha256[place], columns.row[place]
        if root >= 0 and (root, path) in known_paths:
            continue
        has_hash = any(digest)
        if has_hash and digest in known_rows:
            target = known_rows[digest]
        elif row in new_row:
            target = new_row[row]
        else:
            target = new_row[row] = first + len(wanted_rows)
            wanted_rows.append(row)
        names = ("size", "mtime_ns", "sha256", "width", "height", "format", "flags")
        values = {name: getattr(columns, name)[place] for name in names}
        ids[columns.id[place]] = draft.add_item(row=target, root=root, raw_path=path, **values)
    for start in range(0, len(wanted_rows), 65_536):
        draft.add_rows(index.vectors.gather(np.array(wanted_rows[start : start + 65_536])))
    draft.skipped += [{**entry, "root": place_of_root.get(entry["root"], -1)} for entry in index.skipped()]
    if index.metadata is None:
        return None
    old = index.metadata.column("id").to_pylist()
    rows = [row for row, number in enumerate(old) if number in ids]
    table = index.metadata.take(pa.array(rows, pa.int64()))
    fresh = pa.array([ids[old[row]] for row in rows], pa.int64())
    return table.set_column(table.column_names.index("id"), "id", fresh)
