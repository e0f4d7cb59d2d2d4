"""Where rows come from: `open_source` finds the right reader, `RowSource` is what all readers are."""

from __future__ import annotations

import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path

from mmalign.errors import InputError

from .rows import Kind, Row

__all__ = ["RowSource", "digest_files", "open_source", "walk"]

LAYOUTS = (
    "Parquet files (jpg_0, jpg_1, label_0, caption, or image, caption), a folder with metadata.jsonl, "
    "twin folders winner/ and loser/, webdataset tars, a folder written by save_to_disk"
)
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


class RowSource(ABC):
    """Rows in a fixed order, read as a stream or one at a time. Nothing is decoded or checked here.

    Attributes:
        name: what a person calls it.
        kind: "pairs", or captioned "images"; `None` where each row decides for itself.
        columns: names of all columns, for messages; of the first row where rows differ.
    """

    name: str
    kind: Kind | None = None
    columns: tuple[str, ...] = ()

    @abstractmethod
    def __len__(self) -> int:
        """How many rows there are, unusable ones included."""

    @abstractmethod
    def rows(self, start: int = 0) -> Iterator[Row]:
        """All rows from `start` on, in order, a few in memory at a time."""

    @abstractmethod
    def row(self, index: int) -> Row:
        """One row. Safe to call from many threads; cheapest in about ascending order."""

    @abstractmethod
    def state(self) -> str:
        """A hexadecimal digest of file names, sizes and modification times: another one if the source has changed."""


def open_source(data: str | os.PathLike[str] | RowSource, *, split: str | None = None) -> RowSource:
    """Find the reader for training data; only names, sizes and headers are read yet.

    Args:
        data: a Parquet file or a folder of them (at any depth); a folder with `metadata.jsonl`, or such a file; a
            folder with `winner/` and `loser/`; a webdataset tar of captioned images, or a folder of them (at any
            depth); a folder that `save_to_disk` of the `datasets` library wrote;
            `datasets:NAME` (a hub name or path for `datasets.load_dataset`), which a bare `ORG/NAME` that is no path
            here also means.
        split: for `datasets:` and `save_to_disk` the split ("train" by default); for a folder of Parquet files those
            of that name (`train-00000-of-00010.parquet`, `train/0.parquet`).

    Raises:
        InputError: nothing of these is there, columns are missing, or the dataset cannot be loaded.
    """
    if isinstance(data, RowSource):
        return data
    text = os.fspath(data)
    if not text.strip():
        raise InputError(f"the training data have no name; give {LAYOUTS}, or datasets:NAME")
    if text.startswith("datasets:"):
        from .hub import HubSource

        return HubSource(text.removeprefix("datasets:"), split or "train")
    path = Path(text).expanduser()
    if not path.exists():
        if isinstance(data, str) and _HUB_NAME.fullmatch(text) and not text.startswith("."):
            from .hub import HubSource

            return HubSource(text, split or "train")
        raise InputError(f"{text!r} does not exist; give {LAYOUTS}, or datasets:NAME")
    if path.suffix.lower() in (".parquet", ".pq") and path.is_file():
        from .parquet import ParquetSource

        _refuse_split(text, split)
        return ParquetSource(path.parent, [path])
    if path.suffix.lower() == ".tar" and path.is_file():
        from .tar import TarSource

        _refuse_split(text, split)
        return TarSource(path.parent, [path])
    if path.is_file():
        if path.suffix.lower() not in (".jsonl", ".ndjson"):
            raise InputError(f"{text!r} is not .parquet or .jsonl; give {LAYOUTS}, or datasets:NAME")
        from .folder import MetadataSource

        _refuse_split(text, split)
        return MetadataSource(path)
    return _open_folder(path, split)


def _open_folder(path: Path, split: str | None) -> RowSource:
    if (path / "metadata.jsonl").is_file():
        from .folder import MetadataSource

        _refuse_split(str(path), split)
        return MetadataSource(path / "metadata.jsonl")
    twins = [name for name in ("winner", "loser") if (path / name).is_dir()]
    if len(twins) == 2:
        from .twins import TwinSource

        _refuse_split(str(path), split)
        return TwinSource(path)
    if twins:
        absent = "loser" if twins == ["winner"] else "winner"
        raise InputError(f"{str(path)!r} has a folder {twins[0]}/ but no {absent}/; add it, with files of equal names")
    several_splits = (path / "dataset_dict.json").is_file()
    if several_splits or all((path / name).is_file() for name in ("dataset_info.json", "state.json")):
        from .hub import HubSource

        if not several_splits:
            _refuse_split(str(path), split)
        return HubSource(str(path), split or "train")
    below = walk(path)
    files = [file for file in below if file.suffix.lower() in (".parquet", ".pq")]
    tars = [file for file in below if file.suffix.lower() == ".tar"]
    if tars and not files:
        from .tar import TarSource

        _refuse_split(str(path), split)
        return TarSource(path, tars)
    if split is not None:
        of_split = [file for file in files if _is_of_split(file.relative_to(path), split)]
        if files and not of_split:
            raise InputError(f"{str(path)!r} has no Parquet file of split {split!r}; the first is {files[0].name!r}")
        files = of_split
    if not files:
        raise InputError(f"{str(path)!r} holds no training data; it needs {LAYOUTS}")
    from .parquet import ParquetSource

    return ParquetSource(path, files)


def _refuse_split(name: str, split: str | None) -> None:
    if split is not None:
        raise InputError(f"{name!r} has no splits; leave out the split {split!r}")


def _is_of_split(file: Path, split: str) -> bool:
    return split in file.parts[:-1] or re.match(re.escape(split) + r"(?![A-Za-z0-9_])", file.name) is not None


def walk(folder: Path) -> list[Path]:
    """All files below a folder but hidden ones, in order of their relative paths."""
    found = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(found, key=lambda file: file.relative_to(folder).as_posix())


def digest_files(root: Path, files: Iterable[Path], *also: str) -> str:
    """SHA-256 over paths (relative to `root` where they are below it), sizes and modification times."""
    digest = hashlib.sha256("\0".join(also).encode("utf-8", "surrogatepass"))
    for file in files:
        name = os.path.relpath(file, root) if file.is_relative_to(root) else str(file)
        try:
            status = file.stat()
            known = f"{status.st_size} {status.st_mtime_ns}"
        except (OSError, ValueError):  # ValueError: a name that no file can have
            known = "absent"
        digest.update(f"{name}\0{known}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
