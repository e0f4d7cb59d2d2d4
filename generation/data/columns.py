"""Tables of Arrow data as rows: the columns of Pick-a-Pic, and those of captioned images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from mmalign.errors import InputError

from .rows import IMAGES, Kind, Row, likely_column

__all__ = ["Columns", "find_columns", "form_rows"]

_CAPTIONS = ("caption", "text")
_WANTED = "pairs need jpg_0, jpg_1, label_0, caption; captioned images need image, caption"


@dataclass(frozen=True)
class Columns:
    """Which columns of a table make a row."""

    images: tuple[str, ...]
    caption: str
    label: str | None
    rewards: tuple[str, ...]

    @property
    def kind(self) -> Kind:
        """What a row is."""
        return "pairs" if len(self.images) == IMAGES["pairs"] else "images"

    @property
    def names(self) -> list[str]:
        """All that must be read."""
        return [*self.images, self.caption, *([self.label] if self.label else []), *self.rewards]


def find_columns(schema: pa.Schema, where: str) -> Columns:
    """The columns of pairs, or else those of captioned images.

    Raises:
        InputError: one is missing, or an image column holds something else; lists what was found.
    """
    names = schema.names
    found = ", ".join(names[:30]) + (", ..." if len(names) > 30 else "")
    caption = next((name for name in _CAPTIONS if name in names), None)
    pair = "image" not in names or {"jpg_0", "jpg_1", "label_0"} <= set(names)
    images = ("jpg_0", "jpg_1") if pair else ("image",)
    missing = [name for name in (*images, *(["label_0"] if pair else [])) if name not in names]
    missing += [] if caption else ["caption"]
    if missing or caption is None:
        likely = [column for column in (likely_column(name, names) for name in missing) if column]
        asked = f" (did you mean {' and '.join(map(repr, likely))}?)" if likely else ""
        raise InputError(f"{where} has no column {', '.join(missing)}{asked}: {_WANTED}; found {found}")
    for name in images:
        if not _holds_images(schema.field(name).type):
            raise InputError(
                f"column {name} of {where} holds {schema.field(name).type}, not images; "
                "store encoded bytes (binary), or a struct of bytes and path"
            )
    wanted = ("reward_0", "reward_1") if pair else ("reward",)
    rewards = wanted if set(wanted) <= set(names) else ()
    return Columns(images, caption, "label_0" if pair else None, rewards)


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 or kind.get_field_index("path") >= 0
    binary = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
    paths = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(test(kind) for test in (*binary, *paths))


def form_rows(
    table: pa.Table | pa.RecordBatch, columns: Columns, indexes: Sequence[int], names: Sequence[str], folder: Path
) -> Iterator[Row]:
    """One row for each of the table; `folder` is what paths in it are relative to."""
    for place, (index, name) in enumerate(zip(indexes, names, strict=True)):
        cells = {column: _cell(table.column(column)[place]) for column in columns.names}
        caption = cells[columns.caption]
        images = tuple(_image(cells[column], folder) for column in columns.images)
        rewards = tuple(cells[column] for column in columns.rewards)
        label = cells[columns.label] if columns.label else None
        known = None if all(reward is None for reward in rewards) else rewards
        yield Row(index, name, caption, images, label, known, None)


def _cell(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return scalar.as_buffer().to_pybytes()


def _image(value: Any, folder: Path) -> bytes | Path | None:
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        return folder / value if value else None
    return value
