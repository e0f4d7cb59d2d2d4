"""The item table: one line an image file. Several files with equal content share one vector row."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int

from mmalign.errors import IndexDamagedError

__all__ = [
    "NO_HASH",
    "SCHEMA",
    "Item",
    "ItemColumns",
    "Items",
    "display_path",
    "iterate",
    "positions_of_files",
    "read_arrow",
    "write_arrow",
]

# Stands for the content hash of items whose file was never read (imported vectors).
NO_HASH = bytes(32)

SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("row", pa.int64()),
        ("root", pa.int16()),
        ("name", pa.string()),
        ("name_bytes", pa.binary()),
        ("size", pa.int64()),
        ("mtime_ns", pa.int64()),
        ("sha256", pa.binary(32)),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("format", pa.string()),
        ("flags", pa.string()),
    ]
)


@dataclass(frozen=True)
class Item:
    """One image file of an index.

    Attributes:
        id: stable for the life of the index.
        row: vector row; files of equal content share it.
        path: where the file is, absolute; can be opened even if its name is not valid UTF-8.
        name: path below the indexed folder, printable.
        size: bytes.
        mtime_ns: modification time, nanoseconds since 1970.
        sha256: hex digest of the content.
        width: pixels, upright.
        height: pixels, upright.
        format: JPEG, PNG, ...
        flags: what was not plain about it, see `mmalign.imaging.FLAGS`.
    """

    id: int
    row: int
    path: Path
    name: str
    size: int
    mtime_ns: int
    sha256: str
    width: int
    height: int
    format: str
    flags: tuple[str, ...]

    @property
    def exists(self) -> bool | None:
        """Whether the file is there now; `None` for a relative name of which nobody said where it is."""
        return self.path.exists() if self.path.is_absolute() else None

    @property
    def as_indexed(self) -> bool:
        """Whether the file is there, with the size and time it was indexed with; just there, if it never was read."""
        try:
            about = self.path.stat()
        except OSError:
            return False
        return self.sha256 == NO_HASH.hex() or (about.st_size, about.st_mtime_ns) == (self.size, self.mtime_ns)


def display_path(raw: bytes) -> str:
    """A path as printable text: bytes that are no UTF-8 come out as `\\udcXX`, control characters as escapes."""
    text = os.fsdecode(raw).encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class Items:
    """The table as stored: memory-mapped, read where needed."""

    def __init__(self, table: pa.Table, roots: Sequence[Path]) -> None:
        self.table = table.combine_chunks() if table.column("id").num_chunks > 1 else table
        self.roots = list(roots)
        self._columns = [column.chunk(0) if column.num_chunks else pa.array([], column.type) for column in self.table]
        self._name = {name: number for number, name in enumerate(self.table.column_names)}

    def __len__(self) -> int:
        return self.table.num_rows

    def numbers(self, name: str) -> Int[np.ndarray, " items"]:
        """An integer column without copying."""
        return self._columns[self._name[name]].to_numpy(zero_copy_only=True)

    def value(self, name: str, position: int) -> Any:
        """One cell."""
        return self._columns[self._name[name]][position].as_py()

    def raw_name(self, position: int) -> bytes:
        """The path below its root as the file system has it."""
        raw, name = self.value("name_bytes", position), self.value("name", position)
        if raw is None and name is None:
            raise IndexDamagedError(f"line {position} of the item table has no name; index the folder again")
        return raw if raw is not None else name.encode()

    def item(self, position: int) -> Item:
        """The item in one line of the table."""
        get = self.value
        raw = self.raw_name(position)
        root = get("root", position)
        path = Path(os.fsdecode(raw))
        flags = get("flags", position)
        return Item(
            id=get("id", position),
            row=get("row", position),
            path=self.roots[root] / path if root >= 0 else path,
            name=display_path(raw),
            size=get("size", position),
            mtime_ns=get("mtime_ns", position),
            sha256=get("sha256", position).hex(),
            width=get("width", position),
            height=get("height", position),
            format=get("format", position),
            flags=tuple(flags.split(",")) if flags else (),
        )

    def alive(self, rows: int) -> Bool[np.ndarray, " rows"]:
        """Which vector rows belong to some item."""
        mask = np.zeros(rows, bool)
        mask[self.numbers("row")] = True
        return mask

    @cached_property
    def _order(self) -> tuple[Int[np.ndarray, " items"] | None, Int[np.ndarray, " items"]]:
        rows = self.numbers("row")
        if len(rows) < 2 or bool(np.all(rows[1:] >= rows[:-1])):
            return None, rows
        order = np.argsort(rows, kind="stable")
        return order, rows[order]

    def positions_of_row(self, row: int) -> list[int]:
        """Lines of the table that share a vector row; the first indexed comes first."""
        order, rows = self._order
        low, high = np.searchsorted(rows, [row, row + 1])
        return list(range(low, high)) if order is None else [int(p) for p in order[low:high]]


@dataclass
class ItemColumns:
    """The table while it is being changed: plain columns."""

    id: list[int] = field(default_factory=list)
    row: list[int] = field(default_factory=list)
    root: list[int] = field(default_factory=list)
    raw_name: list[bytes] = field(default_factory=list)
    size: list[int] = field(default_factory=list)
    mtime_ns: list[int] = field(default_factory=list)
    sha256: list[bytes] = field(default_factory=list)
    width: list[int] = field(default_factory=list)
    height: list[int] = field(default_factory=list)
    format: list[str] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, items: Items) -> ItemColumns:
        """Copy a stored table."""
        table = items.table
        columns = {name: table.column(name).to_pylist() for name in table.column_names if not name.startswith("name")}
        names, raw = table.column("name").to_pylist(), table.column("name_bytes").to_pylist()
        return cls(raw_name=[n.encode() if r is None else r for n, r in zip(names, raw, strict=True)], **columns)

    def __len__(self) -> int:
        return len(self.id)

    def append(self, **values: Any) -> None:
        """Add a line; every column must be given."""
        for name, value in values.items():
            getattr(self, name).append(value)

    def keep(self, mask: Sequence[bool] | np.ndarray) -> None:
        """Drop the lines where the mask is false."""
        for name in self.__dataclass_fields__:
            setattr(self, name, [value for value, wanted in zip(getattr(self, name), mask, strict=True) if wanted])

    def to_table(self) -> pa.Table:
        """In the stored schema, ordered as it is."""
        shown = [display_path(raw) for raw in self.raw_name]
        exact = [None if raw == text.encode() else raw for raw, text in zip(self.raw_name, shown, strict=True)]
        columns = [
            self.id, self.row, self.root, shown, exact, self.size, self.mtime_ns, self.sha256, self.width, self.height,
            self.format, self.flags,
        ]  # fmt: skip
        return pa.table([pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)], schema=SCHEMA)


def positions_of_files(items: Items, files: Sequence[str]) -> list[int | None]:
    """Line of each file in the item table, by its path below the indexed folder or by a bare name that occurs once."""
    places = _positions(items)
    return [places.get(os.fsencode(file), places.get(os.fsencode(Path(file).name))) for file in files]


def _positions(items: Items) -> dict[bytes, int]:
    """Line of every path, and of every bare name that occurs once."""
    paths = {items.raw_name(position): position for position in range(len(items))}
    names: dict[bytes, int] = {}
    for path, position in paths.items():
        name = path.rpartition(b"/")[2]
        names[name] = -1 if name in names else position
    return {**{name: position for name, position in names.items() if position >= 0}, **paths}


def write_arrow(table: pa.Table, file: IO[bytes]) -> None:
    """Arrow IPC, uncompressed, so that readers can map it."""
    with pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table.combine_chunks())


def read_arrow(path: Path, schema: pa.Schema | None = None) -> pa.Table:
    """Map an Arrow IPC file.

    Raises:
        IndexDamagedError: it is not one, or not of that schema.
    """
    try:
        with pa.memory_map(os.fspath(path)) as source:
            table = pa.ipc.open_file(source).read_all()
        if schema is not None and not table.schema.equals(schema):
            raise pa.ArrowInvalid(f"columns {', '.join(table.column_names)}")
        return table
    except (OSError, ValueError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise IndexDamagedError(f"{str(path)!r} cannot be read ({reason}); index the folder again") from None


def iterate(items: Items) -> Iterator[Item]:
    """All items in table order."""
    return (items.item(position) for position in range(len(items)))
