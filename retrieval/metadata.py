"""The user's own columns: read from CSV, JSON lines or Parquet, joined to items by file name."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mmalign.errors import InputError

__all__ = ["concat_metadata", "find_metadata", "join_metadata", "merge_metadata", "number_rows", "read_metadata"]

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

            table = pyarrow.csv.read_csv(path)
            binary = [field.name for field in table.schema if pa.types.is_binary(field.type)]
            if set(binary) - set(_FILE_COLUMNS):
                # Bytes instead of text: not UTF-8. Spreadsheets on Windows write cp1252. File names stay as they are.
                again = pyarrow.csv.read_csv(path, read_options=pyarrow.csv.ReadOptions(encoding="cp1252"))
                for place, name in enumerate(table.column_names):
                    if name in binary and name not in _FILE_COLUMNS:
                        table = table.set_column(place, name, again.column(place))
            return table
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


def read_metadata(path: Path) -> pa.Table:
    """A table whose first column, `file`, says which image file a row is about; the others under their own names.

    The file column is the first there is of `file_name`, `file`, `path`, `filename` and `image`.

    Raises:
        InputError: it cannot be read, has no such column, or has columns that differ only in case.
    """
    table = read_table(path)
    names = table.column_names
    column = next((name for name in _FILE_COLUMNS if name in names), None)
    if column is None:
        raise InputError(
            f"{str(path)!r} has no file column ({', '.join(_FILE_COLUMNS)}); its columns are {', '.join(names)}"
        )
    if len({name.lower() for name in names}) < len(names):
        raise InputError(f"{str(path)!r} has columns of the same name ({', '.join(names)}); rename them")
    return table.add_column(0, _FILE, table.column(column))


# Not a name that a column of the user's could have.
_FILE = "\0file"


def join_metadata(table: pa.Table, ids_of_path: Mapping[bytes, int]) -> tuple[pa.Table, int]:
    """Columns by item id, and how many rows named no indexed file.

    A row belongs to the item whose path below the indexed folder equals its file column, or whose bare name does if
    that name occurs once. A file named twice takes its last row.

    Args:
        table: from `read_metadata`.
        ids_of_path: the items of one folder.
    """
    by_name: dict[bytes, int | None] = {}
    for raw, number in ids_of_path.items():
        name = raw.rpartition(b"/")[2]
        by_name[name] = None if name in by_name else number
    row_of_id: dict[int, int] = {}
    unmatched = 0
    for row, value in enumerate(table.column(_FILE).to_pylist()):
        raw = _as_path(value)
        found = ids_of_path.get(raw, by_name.get(raw))
        if found is None:
            unmatched += 1
        else:
            row_of_id[found] = row
    kept = table.take(pa.array(list(row_of_id.values()), pa.int64())).drop_columns([_FILE])
    return number_rows(kept, list(row_of_id)), unmatched


def number_rows(table: pa.Table, ids: Sequence[int]) -> pa.Table:
    """With the ids of the items as column `id`; a column of the user's with that name becomes `metadata_id`."""
    renamed = table.rename_columns(["metadata_id" if name.lower() == "id" else name for name in table.column_names])
    return renamed.append_column("id", pa.array(ids, pa.int64()))


def _as_path(value: Any) -> bytes:
    """A cell of the file column; bytes where a CSV file is no UTF-8."""
    raw = value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogateescape")
    return raw.replace(os.sep.encode(), b"/").removeprefix(b"./")


def merge_metadata(stored: pa.Table | None, fresh: pa.Table, living: Iterable[int]) -> pa.Table | None:
    """Stored rows of the living items, replaced by fresh ones where there are any, in order of `id`."""
    if stored is None:
        return fresh.sort_by("id") if len(fresh) else None
    wanted = pa.array(set(living) - set(fresh.column("id").to_pylist()), pa.int64())
    kept = stored.filter(pc.is_in(stored.column("id"), wanted))
    if not len(kept):
        return fresh.sort_by("id")
    kept = kept.drop_columns([n for n in kept.column_names if kept.column(n).null_count == len(kept)])
    return concat_metadata([kept, fresh]).sort_by("id")


def concat_metadata(tables: Sequence[pa.Table]) -> pa.Table:
    """One below the other; columns that differ in case get the first one's name, those that differ in type are text."""
    spelling: dict[str, str] = {}
    renamed = []
    for table in tables:
        renamed.append(table.rename_columns([spelling.setdefault(n.lower(), n) for n in table.column_names]))
    try:
        return pa.concat_tables(renamed, promote_options="permissive")
    except (pa.ArrowTypeError, pa.ArrowInvalid):
        return pa.concat_tables([_as_text(table, renamed) for table in renamed], promote_options="permissive")


def _as_text(table: pa.Table, tables: Sequence[pa.Table]) -> pa.Table:
    for position, name in enumerate(table.column_names):
        types = {other.schema.field(name).type for other in tables if name in other.column_names}
        if len(types) > 1:
            text = [None if value is None else str(value) for value in table.column(name).to_pylist()]
            table = table.set_column(position, name, pa.array(text, pa.string()))
    return table
