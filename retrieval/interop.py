"""clip-retrieval's layout, in and out: `.npy` shards of half-precision rows beside `.parquet` shards.

FOLDER/img_emb/img_emb_0.npy, img_emb_1.npy, ...
FOLDER/metadata/metadata_0.parquet, ...         same row order; a column `image_path`
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from mmalign.checks import at_least
from mmalign.encoders import Encoder
from mmalign.errors import InputError
from mmalign.files import whole_folder
from mmalign.progress import progress_bar

from .index import ImageIndex
from .metadata import concat_metadata
from .snapshot import Snapshot

__all__ = ["export_clip_retrieval", "import_clip_retrieval"]

_PATH_COLUMNS = ("image_path", "path", "url")


def import_clip_retrieval(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    factory: str | None = None,
    encoder: str | os.PathLike[str] | Encoder | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    progress: bool = False,
) -> ImageIndex:
    """Make an index of an existing collection without embedding it again.

    Args:
        folder: what `clip-retrieval inference` wrote.
        out: a new index folder.
        factory: FAISS factory string or registered type, instead of the choice by size.
        encoder: the model that was used there (spec, folder or encoder), for queries in words; nothing in the
            collection says which it was.
        device: where to run the encoder.
        dtype: weights of its image tower, recorded.
        progress: show a bar.

    Raises:
        InputError: shards are missing, unreadable, or do not pair up (named); rows that are zero or not finite.
    """
    root = Path(folder)
    shards = _numbered(root / "img_emb", r"img_emb_(\d+)\.npy")
    tables = _numbered(root / "metadata", r"metadata_(\d+)\.parquet")
    if not shards:
        raise InputError(f"{str(root)!r} has no img_emb/img_emb_*.npy; give the output folder of clip-retrieval")
    if tables and tables.keys() != shards.keys():
        odd = sorted(tables.keys() ^ shards.keys())
        raise InputError(f"shards {odd[:5]} of {str(root)!r} lack their vectors or their metadata; restore the files")
    with progress_bar("importing", len(shards), unit="shards", enabled=progress) as advance:
        parts, names, columns = [], [], []
        for number in sorted(shards):
            rows = _load_rows(shards[number])
            table = _load_table(tables[number]) if tables else None
            if table is not None and table.num_rows != len(rows):
                raise InputError(f"shard {number} has {len(rows)} vectors and {table.num_rows} metadata rows")
            parts.append(rows)
            column = next((name for name in _PATH_COLUMNS if table is not None and name in table.column_names), None)
            if table is not None and column is not None:
                names += [str(value) for value in table.column(column).to_pylist()]
            else:
                names += [f"{number}/{row}" for row in range(len(rows))]
            columns.append(table)
            advance(1)
    widths = {part.shape[1] for part in parts}
    if len(widths) > 1:
        raise InputError(
            f"the shards of {str(root)!r} have rows of {sorted(widths)} columns; they are of several models"
        )
    metadata = concat_metadata([t for t in columns if t is not None]) if tables else None
    common = _common_root(names)
    return ImageIndex.from_vectors(
        _Stacked(parts),  # type: ignore[arg-type]
        out,
        paths=[os.path.relpath(name, common) for name in names] if common else names,
        root=common,
        metadata=metadata,
        factory=factory,
        encoder=encoder,
        device=device,
        dtype=dtype,
        progress=progress,
    )


def export_clip_retrieval(
    index: ImageIndex, out: str | os.PathLike[str], *, rows_a_shard: int = 100_000, progress: bool = False
) -> Path:
    """Write an index in that layout, one row an item. The folder appears whole or not at all.

    Raises:
        InputError: `out` exists and is not an empty folder, or cannot be written.
    """
    at_least("rows_a_shard", rows_a_shard)
    target = Path(out)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise InputError(f"{str(target)!r} exists and is no empty folder; choose another with --out (out=...)")
    with whole_folder(target, remedy="choose another place with --out (out=...), or make room") as fresh:
        _write_shards(index.snapshot, fresh, rows_a_shard, progress)
    return target


def _write_shards(snapshot: Snapshot, target: Path, rows_a_shard: int, progress: bool) -> None:
    (target / "img_emb").mkdir()
    (target / "metadata").mkdir()
    rows = snapshot.items.numbers("row")
    with progress_bar("exporting", len(rows), unit="vectors", enabled=progress) as advance:
        for number, start in enumerate(range(0, len(rows), rows_a_shard)):
            part = range(start, min(start + rows_a_shard, len(rows)))
            vectors = snapshot.vectors.gather(rows[part.start : part.stop])
            np.save(target / f"img_emb/img_emb_{number}.npy", vectors.astype(np.float16))
            pq.write_table(_export_rows(snapshot, part), target / f"metadata/metadata_{number}.parquet")
            advance(len(part))


def _export_rows(snapshot: Snapshot, part: range) -> pa.Table:
    items = [snapshot.items.item(position) for position in part]
    table = pa.table(
        {
            "image_path": [os.fspath(item.path).encode("utf-8", "backslashreplace").decode() for item in items],
            "id": [item.id for item in items],
            "width": [item.width for item in items],
            "height": [item.height for item in items],
            "sha256": [item.sha256 for item in items],
        }
    )
    if snapshot.metadata is None:
        return table
    # A join would not keep the order of rows, nor take lists and structs.
    places = pc.index_in(table.column("id"), snapshot.metadata.column("id"))
    for name in snapshot.metadata.column_names:
        if name not in table.column_names:
            table = table.append_column(name, snapshot.metadata.column(name).take(places))
    return table


class _Stacked:
    """Memory-mapped shards as one [n, dim] thing that is sliced in pieces and never read whole."""

    def __init__(self, parts: list[np.ndarray]) -> None:
        self.parts = parts
        self.starts = np.cumsum([0, *(len(part) for part in parts)])
        self.shape = (int(self.starts[-1]), parts[0].shape[1])
        self.ndim = 2
        self.dtype = parts[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, wanted: slice) -> np.ndarray:
        low, high, _ = wanted.indices(len(self))
        pieces = [
            part[max(low - first, 0) : max(high - first, 0)]
            for part, first in zip(self.parts, self.starts[:-1], strict=True)
            if first < high and first + len(part) > low
        ]
        return np.concatenate(pieces) if pieces else np.zeros((0, self.shape[1]), self.dtype)


def _numbered(folder: Path, pattern: str) -> dict[int, Path]:
    if not folder.is_dir():
        return {}
    matches = ((re.fullmatch(pattern, path.name), path) for path in folder.iterdir())
    return {int(match[1]): path for match, path in matches if match}


def _load_rows(path: Path) -> np.ndarray:
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)!r} is not a readable .npy file ({error}); restore it") from None
    if rows.ndim != 2:
        raise InputError(f"{str(path)!r} has shape {rows.shape}; expected rows of vectors")
    return rows


def _load_table(path: Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{str(path)!r} is not a readable Parquet file ({error}); restore it") from None


def _common_root(names: list[str]) -> Path | None:
    """The folder that holds all files, if they are absolute paths below one."""
    if not names or not all(Path(name).is_absolute() for name in names):
        return None
    common = Path(os.path.commonpath(names))
    return common if len(set(names)) > 1 else common.parent
