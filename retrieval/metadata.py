"""The user's own columns: read from CSV, JSON lines or Parquet, joined to items by file name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa

from mmalign.errors import InputError

__all__ = ["find_metadata", "join_metadata", "read_table"]

_FILE_COLUMNS = ("file_name", "file", "path", "filename", "image")
_AUTOMATIC = ("metadata.parquet", "metadata.jsonl", "metadata.csv")


def find_metadata(root: Path) -> Path | None:
    """`metadata.parquet`, `.jsonl` or `.csv` in the folder itself (the imagefolder convention)."""
    return next((root / name for name in _AUTOMATIC if (root / name).is_file()), None)


def read_table(path: Path) -> pa.Table:
    """Read by suffix.

    Raises:
        InputError: missing, unreadable, or another suffix.
    """
    suffix = path.suffix.lower()
    try:
        if suffix == ".csv":
            import pyarrow.csv

            return pyarrow.csv.read_csv(path)
        if suffix in (".jsonl", ".ndjson", ".json"):
            import pyarrow.json

            return pyarrow.json.read_json(path)
        if suffix in (".parquet", ".pq"):
            import pyarrow.parquet

            return pyarrow.parquet.read_table(path)
    except FileNotFoundError:
        raise InputError(f"{str(path)!r} does not exist; check the path") from None
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{str(path)!r} cannot be read as {suffix[1:]} ({reason}); mend or convert it") from None
    raise InputError(f"{str(path)!r} is not .csv, .jsonl or .parquet; convert it to one of these")


def join_metadata(path: Path, ids_of_path: Mapping[bytes, int]) -> tuple[pa.Table, int]:
    """Columns by item id, and how many rows named no indexed file.

    A row belongs to the item whose path below the indexed folder equals its file column (`file_name`, `file`, `path`,
    `filename` or `image`), or whose bare name does if that name occurs once.

    Raises:
        InputError: no such column, or no row fits any item.
    """
    table = read_table(path)
    column = next((name for name in _FILE_COLUMNS if name in table.column_names), None)
    if column is None:
        raise InputError(
            f"{str(path)!r} has no file column ({', '.join(_FILE_COLUMNS)}); its columns are "
            f"{', '.join(table.column_names)}"
        )
    by_name: dict[bytes, int | None] = {}
    for raw, number in ids_of_path.items():
        name = raw.rpartition(b"/")[2]
        by_name[name] = None if name in by_name else number
    rows, ids = [], []
    for row, value in enumerate(table.column(column).to_pylist()):
        raw = os.fsencode(str(value).replace(os.sep, "/")).removeprefix(b"./")
        found = ids_of_path.get(raw, by_name.get(raw))
        if found is not None:
            rows.append(row)
            ids.append(found)
    if not rows and len(ids_of_path) and table.num_rows:
        raise InputError(
            f"none of the {table.num_rows} rows of {str(path)!r} names an indexed file (first: "
            f"{table.column(column)[0].as_py()!r}); give paths relative to the indexed folder"
        )
    last = dict(zip(ids, rows, strict=True))  # a file named twice takes its last row
    kept = table.take(pa.array(list(last.values()), pa.int64()))
    if "id" in kept.column_names:
        kept = kept.rename_columns(["metadata_id" if name == "id" else name for name in kept.column_names])
    return kept.append_column("id", pa.array(list(last), pa.int64())), table.num_rows - len(rows)
