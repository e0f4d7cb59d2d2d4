"""`Features`, and the folder they are kept in: one `.npy` a layer, the items' hashes, and `features.json`.

`features.json` says how many items are done; it is replaced only after their rows have reached the disk. What it counts
is therefore there, whatever happened, and what it does not count is written again.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..encoders import Encoder
from ..encoders.states import Layer
from ..errors import DamagedError, EncoderMismatchError, InputError, reason_of
from ..files import whole_file
from ..metrics._arrays import as_numpy

__all__ = ["FORMAT", "FeatureSet", "FeatureWriter", "Features", "assemble", "load_features", "read_folder"]

FORMAT = 1
RECORD, CONTENT, LOCK = "features.json", "content.txt", ".lock"
_BLOCK_BYTES = 1 << 26


@dataclass(eq=False)
class Features:
    """Raw features, not normalised, one row an item.

    Attributes:
        layers: layer -> rows, as `mmalign.encoders.states` counts layers; memory-mapped where there is a folder.
        content: SHA-256 of each item: of an image's file, of pixels and shape of an image without one, of a text in
            UTF-8, of a row of a table of unknown origin; "" for a file that could not be read.
        usable: False for an image that could not be read: its row is zeros.
        skipped: the unusable rows: `row`, `name`, `reason` (see `mmalign.imaging.REASONS`) and `message`.
        encoder: `spec` and `fingerprint` of the encoder; `None` where it is not known.
        modality: "image", "text", or `None` where it is not known.
        pooling: "cls" or "mean"; `None` where only "output" was extracted.
        folder: where it is kept, if it is.
    """

    layers: dict[Layer, Float[np.ndarray, "n dim"]]
    content: list[str]
    usable: Bool[np.ndarray, " n"]
    skipped: list[dict[str, Any]] = field(default_factory=list)
    encoder: dict[str, str] | None = None
    modality: str | None = None
    pooling: str | None = None
    folder: Path | None = None

    def __len__(self) -> int:
        return len(self.content)

    def __getitem__(self, layer: Layer) -> Float[np.ndarray, "n dim"]:
        if layer not in self.layers:
            there = ", ".join(repr(name) for name in self.layers)
            raise InputError(f"layer is {layer!r}; these features hold {there}")
        return self.layers[layer]

    def only(self, layer: Layer) -> Features:
        """These features with one of their layers.

        Raises:
            InputError: they do not hold it.
        """
        return replace(self, layers={layer: self[layer]}, pooling=None if layer == "output" else self.pooling)

    def take(self, rows: Int[np.ndarray, " k"]) -> Features:
        """Some rows, in that order, in memory."""
        place = {int(row): at for at, row in enumerate(rows)}
        return Features(
            {name: np.asarray(table[rows]) for name, table in self.layers.items()},
            [self.content[row] for row in rows],
            self.usable[rows],
            [{**entry, "row": place[entry["row"]]} for entry in self.skipped if entry["row"] in place],
            self.encoder,
            self.modality,
            self.pooling,
        )

    def require_encoder(self, encoder: Encoder) -> None:
        """Check that these features are `encoder`'s; where it is not known whose they are, nothing is checked.

        Raises:
            EncoderMismatchError: they are another's.
        """
        if self.encoder is not None and self.encoder["fingerprint"] != encoder.fingerprint:
            raise EncoderMismatchError(
                f"the features are of {self.encoder['spec']!r} (fingerprint {self.encoder['fingerprint'][:12]}), not "
                f"of {encoder.spec!r} (fingerprint {encoder.fingerprint[:12]}); extract them with that encoder"
            )


FeatureSet: TypeAlias = Features | str | os.PathLike[str] | np.ndarray | Tensor


def load_features(source: FeatureSet) -> Features:
    """Features that are there already.

    Args:
        source: a folder that `extract_features` filled, a `.npy` file of floats, or such an array or tensor; the latter
            become the layer "output" of an unknown encoder. `Features` are given back as they are.

    Raises:
        InputError: nothing of that kind, an extraction that has not ended, or rows with NaN or infinity.
        DamagedError: files of the folder are missing or cut.
    """
    if isinstance(source, Features):
        return source
    if not isinstance(source, (str, os.PathLike)):
        return _of_table(as_numpy(source), "the array")
    path = Path(source)
    if path.is_dir():
        return read_folder(path)
    try:
        table = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        # numpy takes whatever is no .npy for a pickle, and advises to load that.
        reason = reason_of(error) if isinstance(error, OSError) else "it is no .npy file"
        raise InputError(
            f"{str(path)!r} cannot be read ({reason}); give a .npy file of floats, or a folder made by extract_features"
        ) from None
    return _of_table(table, repr(str(path)))


def _of_table(table: Any, name: str) -> Features:
    if not isinstance(table, np.ndarray) or table.ndim != 2 or table.dtype.kind != "f" or 0 in table.shape:
        found = f"{table.shape} of {table.dtype}" if isinstance(table, np.ndarray) else type(table).__name__
        raise InputError(f"{name} is {found}; give a table of floats, one row an item")
    content: list[str] = []
    bad: list[int] = []
    step = max(1, _BLOCK_BYTES // (table.shape[1] * table.itemsize))
    for start in range(0, len(table), step):
        block = np.ascontiguousarray(table[start : start + step])
        bad += (start + np.flatnonzero(~np.isfinite(block).all(axis=1))).tolist()
        content += [hashlib.sha256(row).hexdigest() for row in block]
    if bad:
        first = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
        raise InputError(f"{name} has NaN or infinity in {len(bad)} of {len(table)} rows ({first}); leave them out")
    return Features({"output": table}, content, np.ones(len(table), bool))


def read_folder(folder: Path) -> Features:
    """What a finished extraction left.

    Raises:
        InputError: no such folder, or an extraction that has not ended.
        DamagedError: files are missing or cut.
    """
    record = read_record(folder)
    if record is None:
        inside = sorted(path.parent.name for path in folder.glob(f"*/{RECORD}"))
        hint = f"give one of the folders in it: {', '.join(inside)}" if inside else "extract features there first"
        raise InputError(f"{str(folder)!r} holds no {RECORD}; {hint}")
    if record["done"] < record["items"]:
        raise InputError(
            f"the extraction into {str(folder)!r} has not ended ({record['done']} of {record['items']} items); run it "
            "again to continue"
        )
    layers, content = _open_layers(folder, record), _read_content(folder, record)
    features = assemble(layers, content, record["skipped"], record["encoder"], record["modality"], record["pooling"])
    features.folder = folder
    return features


def assemble(
    layers: dict[Layer, Float[np.ndarray, "n dim"]],
    content: list[str],
    skipped: list[dict[str, Any]],
    encoder: dict[str, str],
    modality: str,
    pooling: str | None,
) -> Features:
    """`Features` whose usable rows are those that were not skipped."""
    usable = np.ones(len(content), bool)
    usable[[entry["row"] for entry in skipped]] = False
    return Features(
        layers, content, usable, sorted(skipped, key=lambda entry: entry["row"]), encoder, modality, pooling
    )


def read_record(folder: Path) -> dict[str, Any] | None:
    """`features.json`, or `None` where there is none.

    Raises:
        InputError: it is of a newer format.
        DamagedError: it cannot be read.
    """
    path = folder / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        newer = record["format"] > FORMAT
        if not newer and not set(record) >= _NEEDED:
            raise KeyError(", ".join(sorted(_NEEDED - set(record))))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, f"{RECORD}: {reason_of(error)}") from None
    if newer:
        raise InputError(
            f"{str(path)!r} has format {record['format']}, this mmalign reads up to {FORMAT}; upgrade with "
            "`pip install -U mmalign`"
        )
    return record


_NEEDED = {"format", "rows", "items", "done", "layers", "content_sha256", "skipped", "encoder", "modality", "pooling"}


def _open_layers(folder: Path, record: dict[str, Any]) -> dict[Layer, np.ndarray]:
    opened: dict[Layer, np.ndarray] = {}
    for entry in record["layers"]:
        try:
            table = np.load(folder / entry["file"], mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise _damaged(folder, f"{entry['file']}: {reason_of(error)}") from None
        if (table.shape, str(table.dtype)) != ((record["rows"], entry["width"]), entry["dtype"]):
            raise _damaged(folder, f"{entry['file']} is {table.shape} of {table.dtype}")
        opened[entry["layer"]] = table
    return opened


def _read_content(folder: Path, record: dict[str, Any]) -> list[str]:
    try:
        data = (folder / CONTENT).read_bytes()
    except OSError as error:
        raise _damaged(folder, f"{CONTENT}: {reason_of(error)}") from None
    if hashlib.sha256(data).hexdigest() != record["content_sha256"]:
        raise _damaged(folder, f"{CONTENT} is not what was written")
    return data.decode().splitlines()


def _damaged(folder: Path, what: str) -> DamagedError:
    return DamagedError(f"features in {str(folder)!r} are damaged ({what}); remove the folder and extract them again")


class FeatureWriter:
    """Writes a features folder, which only one process may do at a time, from where an earlier run stopped."""

    def __init__(self, folder: Path, about: Mapping[str, Any], content: Sequence[str], dtype: str) -> None:
        """Clears what a killed run left half-written.

        Args:
            folder: exists, and is locked by the caller.
            about: what the record says besides the state of the work.
            content: one hash a row.
            dtype: "float32" or "float16".
        """
        self.folder, self._about, self._dtype = folder, dict(about), np.dtype(dtype)
        self._content = "".join(f"{digest}\n" for digest in content).encode()
        self._rows = len(content)
        self._remedy = f"make room for {str(folder)!r}, or choose another cache; a rerun continues from what is there"
        self._files: dict[Layer, io.BufferedRandom] = {}
        self._layers: list[dict[str, Any]] = []
        self._state: tuple[int, list[dict[str, Any]]] = (0, [])
        self._recorded: tuple[int, list[dict[str, Any]]] | None = None
        for path in folder.glob(".*"):
            if path.name != LOCK:
                path.unlink(missing_ok=True)
        self._resume()

    @property
    def done(self) -> int:
        """Items whose rows are written."""
        return self._state[0]

    @property
    def skipped(self) -> list[dict[str, Any]]:
        """What will be `Features.skipped`."""
        return self._state[1]

    def count(self, items: int, skipped: list[dict[str, Any]]) -> None:
        """So many more items are written, or skipped for the reasons given; the next `checkpoint` records it."""
        # One assignment: Ctrl-C may come between any two.
        self._state = (self.done + items, self.skipped + skipped if skipped else self.skipped)

    def _resume(self) -> None:
        try:
            record = read_record(self.folder)
            if record is None or any(record.get(name) != value for name, value in self._stated().items()):
                return
            _open_layers(self.folder, record)
            _read_content(self.folder, record)
        except DamagedError:
            return  # all is made anew
        self._layers = record["layers"]
        self._state = self._recorded = (record["done"], record["skipped"])
        self._open()

    def write(self, rows: Sequence[Sequence[int]], values: Mapping[Layer, Float[np.ndarray, "batch dim"]]) -> None:
        """Put vector i of every layer into all of `rows[i]`.

        Raises:
            InputError: it cannot be written.
        """
        if not self._files:
            self._create({layer: table.shape[1] for layer, table in values.items()})
        targets = np.array([row for group in rows for row in group])
        vectors = np.repeat(np.arange(len(rows)), [len(group) for group in rows])
        order = np.argsort(targets)
        targets, vectors = targets[order], vectors[order]
        runs = np.split(np.arange(len(targets)), np.flatnonzero(np.diff(targets) != 1) + 1)
        try:
            for layer, table in values.items():
                file, size = self._files[layer], table.shape[1] * self._dtype.itemsize
                for run in runs:
                    # Not through a memory map, where a full disk kills the process.
                    file.seek(int(targets[run[0]]) * size - self._rows * size, os.SEEK_END)
                    file.write(np.ascontiguousarray(table[vectors[run]], self._dtype).data)
        except OSError as error:
            raise self._cannot_write(error) from None

    def checkpoint(self) -> None:
        """Let the record count what is done.

        Raises:
            InputError: it cannot be written.
        """
        if not self._files or self._state == self._recorded:
            return
        state = self._state
        try:
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise self._cannot_write(error) from None
        record = {**self._stated(), **self._about, "done": state[0], "layers": self._layers, "skipped": state[1]}
        with whole_file(self.folder / RECORD, durable=True, remedy=self._remedy) as fresh:
            fresh.write_text(json.dumps(record, indent=1), encoding="utf-8")
        self._recorded = state

    def close(self) -> None:
        """Close the files; what is not in a checkpoint is written again next time."""
        for file in self._files.values():
            try:
                file.close()
            except OSError:  # a full disk: the rows are not counted
                continue
        self._files = {}

    def _stated(self) -> dict[str, Any]:
        digest = hashlib.sha256(self._content).hexdigest()
        return {"format": FORMAT, "key": self._about["key"], "rows": self._rows, "content_sha256": digest}

    def _create(self, widths: Mapping[Layer, int]) -> None:
        (self.folder / RECORD).unlink(missing_ok=True)  # a record of damaged files must not count fresh ones
        with whole_file(self.folder / CONTENT, durable=True, remedy=self._remedy) as fresh:
            fresh.write_bytes(self._content)
        self._layers = []
        for layer, width in widths.items():
            name = f"layer-{layer}.npy" if layer != "output" else "output.npy"
            header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self._rows, width)}
            with whole_file(self.folder / name, durable=True, remedy=self._remedy) as fresh, fresh.open("wb") as file:
                np.lib.format.write_array_header_1_0(file, header)
                file.truncate(file.tell() + self._rows * width * self._dtype.itemsize)
            self._layers.append({"layer": layer, "file": name, "width": width, "dtype": str(self._dtype)})
        self._open()

    def _open(self) -> None:
        try:
            for entry in self._layers:
                self._files[entry["layer"]] = (self.folder / entry["file"]).open("r+b")
        except OSError as error:
            raise self._cannot_write(error) from None

    def _cannot_write(self, error: OSError) -> InputError:
        return InputError(f"features cannot be written to {str(self.folder)!r} ({reason_of(error)}); {self._remedy}")
