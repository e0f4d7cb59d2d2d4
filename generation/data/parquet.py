"""Parquet files as a source: streamed in small batches, as a set may have hundreds of gigabytes.

Memory is bounded by the pages of one row group, which are the least that can be read; pyarrow puts at least 1,024 rows
into a page where the row group has as many.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mmalign.errors import InputError

from .columns import Columns, find_columns, form_rows
from .rows import Row, unformed
from .sources import RowSource, digest_files

__all__ = ["ParquetSource"]

_BATCH_ROWS = 16
_KEPT_BATCHES = 8
_READ_BYTES = 1 << 20  # of a column at a time; without it pyarrow reads a row group's columns whole, not page by page


@dataclass
class _File:
    path: Path
    name: str
    groups: list[int]  # first row of each row group, and the number of rows
    columns: Columns | None
    wrong: str  # why there are no columns
    names: tuple[str, ...]

    @property
    def rows(self) -> int:
        return self.groups[-1]


@dataclass
class _Cursor:
    """Where random access has got to within one row group: Parquet can only be read forwards."""

    file: int
    group: int
    batches: Iterator[tuple[int, pa.RecordBatch]]
    position: int
    recent: deque[tuple[int, pa.RecordBatch]] = field(default_factory=lambda: deque(maxlen=_KEPT_BATCHES))


class ParquetSource(RowSource):
    """Rows of one or more Parquet files; other columns than `generation.data.columns` wants are not read.

    A file without the wanted columns makes its rows problems, unless no file has them. Paths in image columns are
    relative to the file; what they lead to is not part of `state`.

    Raises:
        InputError: a file is no complete Parquet file, or none has the columns.
    """

    def __init__(self, folder: Path, files: list[Path]) -> None:
        self.folder = folder
        self.name = str(files[0] if len(files) == 1 else folder)
        self._files = [_open(path, folder) for path in files]
        usable = [file.columns for file in self._files if file.columns]
        if not usable:
            raise InputError(self._files[0].wrong)
        kinds = {columns.kind for columns in usable}
        self.kind = kinds.pop() if len(kinds) == 1 else None
        self.columns = next(file.names for file in self._files if file.columns)
        self._starts = [0, *accumulate(file.rows for file in self._files)]
        self._lock = threading.Lock()
        self._cursor: _Cursor | None = None

    def __len__(self) -> int:
        return self._starts[-1]

    def rows(self, start: int = 0) -> Iterator[Row]:
        """All rows from `start` on; a row group that cannot be read makes its rows problems."""
        while start < len(self):
            number = bisect_right(self._starts, start) - 1
            file, local = self._files[number], start - self._starts[number]
            group = bisect_right(file.groups, local) - 1
            end = file.groups[group + 1]
            if file.columns is None:
                end = file.rows
                yield from (self._unformed(number, place) for place in range(local, end))
            else:
                try:
                    for first, batch in self._batches(number, group):
                        skipped = min(max(local - first, 0), batch.num_rows)
                        yield from self._form(number, first + skipped, batch.slice(skipped))
                        local = max(local, first + batch.num_rows)
                except (OSError, pa.ArrowException) as error:
                    yield from (self._unformed(number, place, error) for place in range(local, end))
            start = self._starts[number] + end

    def row(self, index: int) -> Row:
        """One row; a row group is read from its start up to the row, or on from where the last call stopped."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        number = bisect_right(self._starts, index) - 1
        file, local = self._files[number], index - self._starts[number]
        if file.columns is None:
            return self._unformed(number, local)
        with self._lock:
            try:
                first, batch = self._find(number, bisect_right(file.groups, local) - 1, local)
            except (OSError, pa.ArrowException) as error:
                self._cursor = None
                return self._unformed(number, local, error)
        return next(self._form(number, local, batch.slice(local - first, 1)))

    def state(self) -> str:
        """Digest of the Parquet files."""
        return digest_files(self.folder, [file.path for file in self._files])

    def _find(self, number: int, group: int, local: int) -> tuple[int, pa.RecordBatch]:
        cursor = self._cursor
        if cursor and (cursor.file, cursor.group) == (number, group):
            for first, batch in cursor.recent:
                if first <= local < first + batch.num_rows:
                    return first, batch
        if not cursor or (cursor.file, cursor.group) != (number, group) or cursor.position > local:
            start = self._files[number].groups[group]
            cursor = self._cursor = _Cursor(number, group, self._batches(number, group), start)
        for first, batch in cursor.batches:
            cursor.recent.append((first, batch))
            cursor.position = first + batch.num_rows
            if local < cursor.position:
                return first, batch
        raise OSError("the row group ends before the row; the file has changed")

    def _batches(self, number: int, group: int) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Batches of one row group, each with the number of its first row in the file."""
        file = self._files[number]
        assert file.columns is not None
        first = file.groups[group]
        with pq.ParquetFile(file.path, buffer_size=_READ_BYTES, pre_buffer=False) as opened:
            for batch in opened.iter_batches(_BATCH_ROWS, row_groups=[group], columns=file.columns.names):
                yield first, batch
                first += batch.num_rows

    def _form(self, number: int, local: int, batch: pa.RecordBatch) -> Iterator[Row]:
        file = self._files[number]
        assert file.columns is not None
        places = range(local, local + batch.num_rows)
        indexes = [self._starts[number] + place for place in places]
        return form_rows(
            batch, file.columns, indexes, [f"{file.name} row {place}" for place in places], file.path.parent
        )

    def _unformed(self, number: int, local: int, error: Exception | None = None) -> Row:
        file = self._files[number]
        index, name = self._starts[number] + local, f"{file.name} row {local}"
        if error is None:
            return unformed(index, name, "missing_column", file.wrong)
        return unformed(index, name, "unreadable", f"the file cannot be read here ({_first_line(error)})")


def _open(path: Path, folder: Path) -> _File:
    try:
        with pq.ParquetFile(path) as opened:
            counts = [opened.metadata.row_group(i).num_rows for i in range(opened.metadata.num_row_groups)]
            schema = opened.schema_arrow
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"{str(path)!r} is not a complete Parquet file ({_first_line(error)}); fetch or write it again"
        ) from None
    groups = [0, *accumulate(counts)]
    name, names = path.relative_to(folder).as_posix(), tuple(schema.names)
    try:
        return _File(path, name, groups, find_columns(schema, repr(str(path))), "", names)
    except InputError as error:
        return _File(path, name, groups, None, str(error), names)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]
