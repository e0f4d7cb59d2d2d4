"""Datasets of the `datasets` library, by hub name or local path, read as Arrow so that no image is decoded here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmalign.errors import InputError, reason_of

from .columns import find_columns, form_rows
from .rows import Row
from .sources import RowSource, digest_files

__all__ = ["HubSource"]

_BATCH_ROWS = 16


class HubSource(RowSource):
    """One split of what `datasets.load_dataset` loads; the columns are those of Parquet files.

    Raises:
        InputError: the library is not installed, the dataset cannot be had, or columns are missing.
    """

    def __init__(self, name: str, split: str) -> None:
        self.name = f"{name} {split}"
        self._short_name = f"{Path(name).name} {split}" if Path(name).exists() else self.name
        dataset = _load(name, split)
        self.columns = tuple(dataset.column_names)
        self._columns = find_columns(dataset.features.arrow_schema, repr(name))
        self.kind = self._columns.kind
        self._dataset = dataset.select_columns(self._columns.names).with_format("arrow")

    def __len__(self) -> int:
        return len(self._dataset)

    def rows(self, start: int = 0) -> Iterator[Row]:
        """All rows from `start` on."""
        for first in range(start, len(self), _BATCH_ROWS):
            yield from self._form(first, min(first + _BATCH_ROWS, len(self)))

    def row(self, index: int) -> Row:
        """One row."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return next(self._form(index, index + 1))

    def state(self) -> str:
        """Digest of the library's Arrow files, whose names depend on the data they were made of."""
        files = [Path(file["filename"]) for file in self._dataset.cache_files]
        return digest_files(Path("/"), files, self.name, *([] if files else [self._dataset._fingerprint]))

    def _form(self, first: int, end: int) -> Iterator[Row]:
        names = [f"{self._short_name} row {index}" for index in range(first, end)]
        return form_rows(self._dataset[first:end], self._columns, range(first, end), names, Path())


def _load(name: str, split: str) -> Any:
    path = Path(name).expanduser()
    here = "" if path.exists() else "is no path here, and "
    try:
        import datasets
    except ImportError:
        raise InputError(
            f"{name!r} {here}is read by the datasets library, which is not installed; "
            'run pip install "mmalign[train]", or give Parquet files'
        ) from None
    try:
        if (path / "dataset_dict.json").is_file():
            splits = datasets.load_from_disk(str(path))
            if split not in splits:
                raise ValueError(f"it has the splits {', '.join(splits)}")
            return splits[split]
        if (path / "state.json").is_file():
            return datasets.load_from_disk(str(path))
        return datasets.load_dataset(str(path) if path.exists() else name, split=split)
    except Exception as error:  # the library raises whatever the file, the hub or the network leads it to
        why = reason_of(error)
        if isinstance(error, ConnectionError) or "offline" in why.lower():
            remedy = "connect once and run again, or give local Parquet files"
        else:
            remedy = "check the name and the split, or give local Parquet files"
        raise InputError(f"dataset {name!r} (split {split!r}) {here}cannot be loaded: {why}; {remedy}") from None
