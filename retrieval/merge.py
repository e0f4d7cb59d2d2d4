"""Several indexes into one: what `--shard i/n` on many machines ends in."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from mmalign.errors import InputError
from mmalign.progress import progress_bar

from .draft import Draft
from .finishing import check_type, finish, write_queries
from .folder_state import MAPPED
from .index import ImageIndex
from .items import ItemColumns
from .metadata import concat_metadata
from .options import FaissOptions
from .recorded_encoder import check_same_encoder
from .snapshot import Snapshot
from .storage import Store, find_index

__all__ = ["merge_indexes"]


def merge_indexes(
    parts: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    factory: str | None = None,
    progress: bool = False,
) -> ImageIndex:
    """Write a new index with the items of all parts. The parts are not changed.

    Files of equal content share one vector; a file that several parts name under the same path is taken once.

    Args:
        parts: indexes made with the same encoder, or folders that hold one.
        out: a new folder.
        factory: FAISS factory string or registered type, instead of the choice by size.
        progress: show a bar.

    Raises:
        InputError: no parts, or `out` holds an index.
        EncoderMismatchError: the parts were made with different encoders (both named).
    """
    if not parts:
        raise InputError("name the indexes to merge")
    opened = [Snapshot(Store(find_index(part))) for part in parts]
    first = opened[0]
    for part in opened[1:]:
        check_same_encoder(first.manifest["encoder"], first.store.folder, part.manifest["encoder"], part.store.folder)
    store, options = Store(Path(out)), FaissOptions(factory)
    roots = list(dict.fromkeys(root for part in opened for root in part.roots))
    with store.create() as writer:
        draft = Draft.start(writer, first.manifest["encoder"], roots, decode=first.decode)
        check_type(draft, options)
        with progress_bar("merging", len(opened), unit="indexes", enabled=progress) as advance:
            tables = []
            for part in opened:
                tables.append(_append(draft, part, roots))
                advance(1)
        kept = [table for table in tables if table is not None]
        if kept:
            draft.set_metadata(concat_metadata(kept))
        _take_queries(draft, opened)
        finish(draft, None, options, progress=progress)
    return ImageIndex(store.folder)


def _take_queries(draft: Draft, parts: Sequence[Snapshot]) -> None:
    """Keep the most reference queries that any part has."""
    with_queries = [part for part in parts if part.manifest["queries"]]
    if with_queries:
        best = max(with_queries, key=lambda part: part.manifest["queries"]["count"])
        queries = best.partition.reference_queries()
        assert queries is not None
        write_queries(draft.part, queries, built_in=best.manifest["queries"]["built_in"])


def _append(draft: Draft, part: Snapshot, roots: list[Path]) -> pa.Table | None:
    known_paths = set(zip(draft.items.root, draft.items.raw_name, strict=True))
    columns = ItemColumns.of(part.items)
    listed = zip(draft.items.sha256, draft.items.row, draft.items.flags, strict=True)
    # A vector that was mapped from an old encoder must not stand for a content that was encoded.
    known_rows = {digest: row for digest, row, flags in listed if MAPPED not in flags.split(",")}
    place_of_root = {number: roots.index(root) for number, root in enumerate(part.roots)}
    new_row: dict[int, int] = {}
    wanted_rows: list[int] = []
    ids: dict[int, int] = {}
    first = draft.rows
    for place in range(len(columns)):
        root = place_of_root.get(columns.root[place], -1)
        path, digest, row = columns.raw_name[place], columns.sha256[place], columns.row[place]
        if root >= 0 and (root, path) in known_paths:
            continue
        has_hash = any(digest)
        if has_hash and digest in known_rows and MAPPED not in columns.flags[place].split(","):
            target = known_rows[digest]
        elif row in new_row:
            target = new_row[row]
        else:
            target = new_row[row] = first + len(wanted_rows)
            wanted_rows.append(row)
        names = ("size", "mtime_ns", "sha256", "width", "height", "format", "flags")
        values = {name: getattr(columns, name)[place] for name in names}
        ids[columns.id[place]] = draft.add_item(row=target, root=root, raw_name=path, **values)
    for start in range(0, len(wanted_rows), 65_536):
        draft.add_rows(part.vectors.gather(np.array(wanted_rows[start : start + 65_536])))
    draft.skipped += [{**entry, "root": place_of_root.get(entry["root"], -1)} for entry in part.skipped()]
    if part.metadata is None:
        return None
    old = part.metadata.column("id").to_pylist()
    rows = [row for row, number in enumerate(old) if number in ids]
    table = part.metadata.take(pa.array(rows, pa.int64()))
    fresh = pa.array([ids[old[row]] for row in rows], pa.int64())
    return table.set_column(table.column_names.index("id"), "id", fresh)
