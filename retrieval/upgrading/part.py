"""The second partition of an index whose encoder is being replaced, as it is written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from jaxtyping import Bool, Float, Int

from mmalign.errors import IndexDamagedError

from ..part import Part
from ..storage import Writer

__all__ = ["UpgradePart", "alive_places", "files_beside", "new_entry", "new_rows", "read_left_out", "read_numbers"]

# What a person must know of an image that keeps its old vector.
LeftOut = dict[str, Any]


def new_entry(encoder: dict[str, Any]) -> dict[str, Any]:
    """The manifest's entry `upgrade` when it begins.

    Its keys `encoder`, `segments`, `rows`, `queries`, `faiss`, `calibration` and `measured` mean what the manifest's
    own mean. `places` names a file with the old row of each new row, `order` one with old rows by priority, `bridge`
    one with maps and the support set; `left_out` the images that could not be embedded; `rest` a FAISS index over the
    old rows that are still to be embedded. `stage` is "measuring",
    "measured" or "running"; only in the last are searches answered with it, by `modes` (see `retrieval.upgrading.live`)
    for each kind of query.
    """
    return {
        "stage": "measuring",
        "encoder": encoder,
        "segments": [],
        "rows": 0,
        "queries": None,
        "faiss": None,
        "calibration": None,
        "measured": {},
        "rest": None,
        "places": None,
        "order": None,
        "bridge": None,
        "left_out": None,
        "modes": {},
        "checked": {},
        "report": None,
    }


class UpgradePart(Part):
    """Vectors of the new encoder, each for one old row; the old partition stays whole beside it.

    Attributes:
        places: old row of each new row; -1 where that is gone.
        order: old rows in the order in which they are to be embedded; empty before the start.
        left_out: images that could not be embedded, with `id`, `path`, `reason`, `message`.
        rest: old rows that were still to be embedded when a FAISS index of their own was made; empty without one.
    """

    def __init__(self, writer: Writer, about: dict[str, Any]) -> None:
        super().__init__(writer, about)
        folder = writer.folder
        self.places = read_numbers(folder, about["places"])
        self.order = read_numbers(folder, about["order"]["file"] if about["order"] else None)
        self.left_out = read_left_out(folder, about["left_out"])
        self.rest = read_numbers(folder, about["rest"]["members"] if about["rest"] else None)
        self._written = {"places": True, "order": True, "left_out": True}

    def moved(self, old_rows: int) -> Bool[np.ndarray, " old_rows"]:
        """Which old rows have a new vector."""
        mask: np.ndarray = new_rows(self.places, old_rows) >= 0
        return mask

    def take(self, old_rows: Sequence[int] | Int[np.ndarray, " n"], vectors: Float[np.ndarray, "n dim"]) -> None:
        """Enter new vectors for old rows that have none yet."""
        if len(vectors):
            self.places = np.concatenate([self.places, np.asarray(old_rows, np.int64)])
            self.add_rows(vectors)
            self._changed("places")

    def release(self, old_rows: Int[np.ndarray, " n"], *, manifest: dict[str, Any]) -> Float[np.ndarray, "n dim"]:
        """Take new vectors out again, as if these old rows had none; returns them in the order of the rows given."""
        new_row = dict(zip(self.places.tolist(), range(len(self.places)), strict=True))
        vectors = self.vectors().gather(np.array([new_row[row] for row in old_rows.tolist()], np.int64))
        kept = ~np.isin(self.places, old_rows)
        self.rewrite(kept, manifest=manifest)
        self.places = self.places[kept]
        self.about["faiss"] = self.about["calibration"] = None
        self._changed("places")
        return vectors

    def set_order(self, how: str, rows: Int[np.ndarray, " n"]) -> None:
        """Say in which order the rest is to be embedded."""
        self.order = np.asarray(rows, np.int64)
        self.about["order"] = {"how": how, "file": None}
        self._changed("order")

    def set_left_out(self, entries: Sequence[LeftOut]) -> None:
        """Replace the list of images that could not be embedded."""
        entries = sorted(entries, key=lambda entry: int(entry["id"]))
        if entries != self.left_out:
            self.left_out = entries
            self._changed("left_out")

    def renumber(self, rows: Int[np.ndarray, " old_rows"]) -> None:
        """Follow old rows to their new numbers, -1 for those that are gone."""
        self.places = np.where(self.places >= 0, rows[self.places], -1)
        order = rows[self.order]
        self.order = order[order >= 0]
        self._changed("places", "order")
        self.set_rest(None)

    def set_rest(self, about: dict[str, Any] | None, rows: Int[np.ndarray, " rest"] | None = None) -> None:
        """Replace the FAISS index over old rows that are still to be embedded."""
        self.rest = np.zeros(0, np.int64) if rows is None else rows
        self.about["rest"] = about
        if about is not None:
            about["members"] = self._write_rows(self.rest)
        self.changed = True

    def alive(self, old_alive: Bool[np.ndarray, " old_rows"]) -> Bool[np.ndarray, " rows"]:
        """Which new rows stand for an old row that belongs to an item."""
        return alive_places(self.places, old_alive)

    def record(self) -> list[str]:
        """As `Part.record`, with what lies beside the vectors."""
        names = super().record()
        about = self.about
        if not self._written["places"]:
            about["places"] = self._write_rows(self.places)
        if not self._written["order"] and about["order"]:
            about["order"]["file"] = self._write_rows(self.order)
        if not self._written["left_out"]:
            about["left_out"] = self.writer.add("left_out", self._write_left_out) if self.left_out else None
        self._written = dict.fromkeys(self._written, True)
        return names + files_beside(about) + ([about["rest"]["faiss"]["file"]] if about["rest"] else [])

    def _write_rows(self, rows: Int[np.ndarray, " n"]) -> str | None:
        return self.writer.add("rows", lambda file: np.save(file, rows)) if len(rows) else None

    def _write_left_out(self, file: IO[bytes]) -> None:
        for entry in self.left_out:
            file.write(json.dumps(entry).encode("ascii") + b"\n")

    def _changed(self, *names: str) -> None:
        self.changed = True
        for name in names:
            self._written[name] = False


def new_rows(places: Int[np.ndarray, " rows"], old_rows: int) -> Int[np.ndarray, " old_rows"]:
    """New row of each of so many old ones; -1 for those that have none."""
    rows = np.full(old_rows, -1, np.int64)
    rows[places[places >= 0]] = np.flatnonzero(places >= 0)
    return rows


def alive_places(
    places: Int[np.ndarray, " rows"], old_alive: Bool[np.ndarray, " old_rows"]
) -> Bool[np.ndarray, " rows"]:
    """Which new rows stand for an old row that belongs to an item; a place of -1 stands for none."""
    mask = places >= 0
    mask[mask] = old_alive[places[mask]]
    return mask


def files_beside(about: dict[str, Any]) -> list[str]:
    """Files that an entry `upgrade` names, but for vectors and what is derived from them."""
    names = [about["places"], about["left_out"]]
    names += [about[name]["file"] for name in ("order", "bridge") if about[name]]
    names += [about["rest"]["members"]] if about["rest"] else []
    return [name for name in names if name]


def read_numbers(folder: Path, name: str | None) -> Int[np.ndarray, " n"]:
    """Row numbers that `UpgradePart` wrote.

    Raises:
        IndexDamagedError: the file is gone or damaged.
    """
    if name is None:
        return np.zeros(0, np.int64)
    try:
        rows = np.load(folder / name, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise IndexDamagedError(f"{str(folder / name)!r} cannot be read ({error}); {_ROLL_BACK}") from None
    if rows.ndim != 1 or rows.dtype != np.int64:
        raise IndexDamagedError(f"{str(folder / name)!r} holds {rows.dtype} {rows.shape}; {_ROLL_BACK}")
    return rows


def read_left_out(folder: Path, name: str | None) -> list[LeftOut]:
    """One entry an image: `id`, `path`, `reason`, `message`.

    Raises:
        IndexDamagedError: the file is gone or damaged.
    """
    if name is None:
        return []
    try:
        return [json.loads(line) for line in (folder / name).read_text(encoding="ascii").splitlines()]
    except (OSError, ValueError) as error:
        raise IndexDamagedError(f"{str(folder / name)!r} cannot be read ({error}); {_ROLL_BACK}") from None


_ROLL_BACK = "`mmalign upgrade INDEX --roll-back` gives the index back as it was before the upgrade"
