"""The next generation of an index while it is being made: what every writing operation works on."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool

from mmalign.encoders import Encoder
from mmalign.errors import InputError
from mmalign.imaging import DEFAULT_DECODING, DecodeSettings

from .items import NO_HASH, SCHEMA, ItemColumns, Items, read_arrow, write_arrow
from .metadata import concat_metadata, number_rows
from .part import Part
from .recorded_encoder import with_objects_of
from .roots import resolve_roots, store_roots
from .skipped import read_skipped, write_skipped
from .storage import Manifest, Writer
from .upgrading.part import UpgradePart, files_beside
from .vectors import Vectors, checked_rows

__all__ = ["Draft"]

# Rows that no item refers to any more cost disk and candidates. Beyond this share they are dropped.
DEAD_SHARE = 0.2
MAX_SEGMENTS = 8
CHECKPOINT_SECONDS = 30.0


class Draft:
    """Holds the item table in memory and new vectors until the next checkpoint; old vectors stay on disk."""

    def __init__(self, writer: Writer, manifest: Manifest, *, checkpoint_seconds: float = CHECKPOINT_SECONDS) -> None:
        self.writer = writer
        self.folder = writer.folder
        self.manifest = manifest
        self.part = Part(writer, manifest)
        self.upgrade: UpgradePart | None = None
        if manifest.setdefault("upgrade", None):
            writer.require_intact(manifest, files_beside(manifest["upgrade"]))
            self.upgrade = UpgradePart(writer, manifest["upgrade"])
        writer.require_intact(manifest, [manifest[name] for name in ("items", "metadata", "skipped") if manifest[name]])
        self.skipped: list[dict[str, Any]] = read_skipped(self.folder, manifest)
        self._checkpoint_seconds = checkpoint_seconds
        self._last_checkpoint = time.monotonic()
        self._changed = self._items_changed = False
        self.first_settings: dict[str, Any] = copy.deepcopy(manifest["settings"])
        self._published = self._state()

    @classmethod
    def start(
        cls,
        writer: Writer,
        encoder: dict[str, Any],
        roots: Sequence[Path],
        *,
        decode: DecodeSettings = DEFAULT_DECODING,
        checkpoint_seconds: float = CHECKPOINT_SECONDS,
    ) -> Draft:
        """The draft of a new index; `encoder` is its entry in the manifest (see `retrieval.recorded_encoder`)."""
        manifest: Manifest = {
            "encoder": encoder,
            "roots": store_roots(roots, writer.folder),
            "segments": [],
            "items": None,
            "metadata": None,
            "skipped": None,
            "queries": None,
            "faiss": None,
            "calibration": None,
            "upgrade": None,
            "next_id": 0,
            "settings": {"decode": asdict(decode), "scan": {}, "metadata": {}},
            "measured": {},
        }
        draft = cls(writer, manifest, checkpoint_seconds=checkpoint_seconds)
        draft.touch()  # even an index of nothing is to be written: one of many shards may find no files
        return draft

    @cached_property
    def items(self) -> ItemColumns:
        """The item table, to be changed."""
        return ItemColumns.of(self.stored_items()) if self.manifest["items"] else ItemColumns()

    def stored_items(self) -> Items:
        """The item table as it was at the last checkpoint, mapped; read only."""
        return Items(read_arrow(self.folder / self.manifest["items"], SCHEMA), self.roots())

    @property
    def dim(self) -> int:
        """Width of the vectors."""
        return self.part.dim

    @property
    def rows(self) -> int:
        """Vector rows, those included that no item refers to any more."""
        return self.part.rows

    def alive(self) -> Bool[np.ndarray, " rows"]:
        """Which vector rows belong to an item."""
        if "items" not in self.__dict__ and self.manifest["items"]:
            return self.stored_items().alive(self.rows)
        mask = np.zeros(self.rows, bool)
        mask[self.items.row] = True
        return mask

    @property
    def settings(self) -> dict[str, Any]:
        """What holds until it is said otherwise; part of the manifest, and JSON-safe."""
        settings: dict[str, Any] = self.manifest["settings"]
        return settings

    @property
    def unfinished(self) -> dict[str, int]:
        """Image files found, by number of the folder, where an update has not come to its end; part of the manifest."""
        found: dict[str, int] = self.manifest.setdefault("unfinished", {})
        return found

    @property
    def decode(self) -> DecodeSettings:
        """How files become pixels in this index."""
        return DecodeSettings(**self.settings["decode"])

    def roots(self) -> list[Path]:
        """The indexed folders, where they are now."""
        return resolve_roots(self.manifest["roots"], self.folder)

    def take_objects_of(self, encoder: Encoder) -> None:
        """Record the objects that an encoder has for its images; see `retrieval.recorded_encoder.with_objects_of`."""
        if about := with_objects_of(self.manifest["encoder"], encoder):
            self.manifest["encoder"] = about
            self._changed = True
        if self.upgrade is not None and (about := with_objects_of(self.upgrade.about["encoder"], encoder)):
            self.upgrade.about["encoder"] = about
            self.upgrade.changed = True

    def add_root(self, root: Path) -> None:
        """Take in a further folder."""
        self.manifest["roots"] = [*self.manifest["roots"], *store_roots([root], self.folder)]
        self.touch()

    # -- changing --------------------------------------------------------------------------------------------------

    def add_rows(self, vectors: np.ndarray) -> int:
        """Queue unit rows; returns the row number of the first."""
        return self.part.add_rows(vectors)

    def append_vectors(
        self,
        vectors: np.ndarray,
        *,
        names: Sequence[str] | None = None,
        root: int = -1,
        metadata: pa.Table | None = None,
    ) -> list[int]:
        """Enter rows made elsewhere, each an item of its own; returns their ids.

        Raises:
            InputError: shapes or lengths that do not fit, rows that are zero or not finite.
        """
        for what, given in (("paths", names), ("metadata", metadata)):
            if given is not None and len(given) != len(vectors):
                raise InputError(f"{len(given)} {what} for {len(vectors)} vectors; give one a vector")
        first = self.rows
        starts = range(0, len(vectors), 65_536)
        pieces = (checked_rows(vectors[start : start + 65_536], self.dim, first=start) for start in starts)
        self.part.stream_rows(pieces, len(vectors))
        unread = {"size": 0, "mtime_ns": 0, "sha256": NO_HASH, "width": 0, "height": 0, "format": "", "flags": ""}
        ids = []
        for number in range(len(vectors)):
            name = os.fsencode(names[number] if names is not None else f"vector-{first + number}")
            ids.append(self.add_item(row=first + number, root=root, raw_name=name, **unread))
        if metadata is not None:
            table = number_rows(metadata, ids)
            stored = self.metadata()
            self.set_metadata(concat_metadata([stored, table]) if stored is not None else table)
        return ids

    def add_item(self, **values: Any) -> int:
        """Append a line to the item table; returns its id."""
        number = int(self.manifest["next_id"])
        self.manifest["next_id"] = number + 1
        self.items.append(id=number, **values)
        self.touch()
        return number

    def touch(self) -> None:
        """Say that the item table or another part was changed in place."""
        self._changed = self._items_changed = True

    def set_metadata(self, table: pa.Table | None) -> None:
        """Replace the user's columns (with `id`)."""
        if table is None:
            self.manifest["metadata"] = None
        else:
            self.manifest["metadata"] = self.writer.add("metadata", lambda file: write_arrow(table, file))
        self.touch()

    def metadata(self) -> pa.Table | None:
        """The user's columns as stored."""
        name = self.manifest["metadata"]
        return read_arrow(self.folder / name) if name else None

    def vectors(self) -> Vectors:
        """All rows written so far; queued rows are written first."""
        return self.part.vectors()

    # -- publishing ------------------------------------------------------------------------------------------------

    @property
    def worth_keeping(self) -> bool:
        """Whether stopping now would lose anything: a first build that has found no image yet leaves no index."""
        return len(self.items) > 0 or "generation" in self.manifest

    def checkpoint_if_due(self) -> None:
        """Publish what there is, if the last time was long enough ago for the cost to be small."""
        if self.worth_keeping and time.monotonic() - self._last_checkpoint >= self._checkpoint_seconds:
            started = time.monotonic()
            self.checkpoint()
            # The table is rewritten whole: keep that under a twentieth of the time.
            self._checkpoint_seconds = max(self._checkpoint_seconds, 20 * (time.monotonic() - started))

    def checkpoint(self) -> None:
        """Publish: from here on readers see it, and nothing of it can be lost."""
        self.skipped.sort(key=lambda entry: (entry["root"], entry["path"]))
        others = self.part.changed or (self.upgrade is None) != (self.manifest["upgrade"] is None)
        if self._changed or others or self._state() != self._published:
            self.write_items()
            self.manifest["skipped"] = self._write_skipped()
            self._publish()
        elif self.upgrade is not None and self.upgrade.changed:  # the item table stays as it is
            self._publish()
        self._last_checkpoint = time.monotonic()

    def write_items(self) -> None:
        """Write the item table as it is now, if it was changed since it was last written."""
        if self._items_changed or self.manifest["items"] is None:
            table = self.items.to_table()
            self.manifest["items"] = self.writer.add("items", lambda file: write_arrow(table, file))
            self.manifest["item_count"] = len(self.items)
            self._items_changed = False

    def compact(self) -> None:
        """Rewrite the vectors without dead rows, or into one segment, where that pays."""
        alive = self.alive()
        dead = self.rows - int(alive.sum())
        if dead <= DEAD_SHARE * self.rows and len(self.part.segments) <= MAX_SEGMENTS:
            return
        if dead <= DEAD_SHARE * self.rows:
            alive[:] = True  # joining alone keeps row numbers, and with them the FAISS file
        self.part.rewrite(alive, manifest=self.manifest)
        if not alive.all():
            renumbered = np.where(alive, np.cumsum(alive) - 1, -1)
            self.items.row = [int(renumbered[row]) for row in self.items.row]
            self.touch()
            self.manifest["faiss"] = None
            if self.upgrade is not None:
                self.upgrade.renumber(renumbered)

    def _write_skipped(self) -> str | None:
        return self.writer.add("skipped", lambda file: write_skipped(self.skipped, file)) if self.skipped else None

    def _publish(self) -> None:
        manifest = self.manifest
        names = self.part.record()
        names += [manifest[part] for part in ("items", "metadata", "skipped") if manifest[part]]
        if self.upgrade is not None:
            names += self.upgrade.record()
        manifest["upgrade"] = None if self.upgrade is None else self.upgrade.about
        self.manifest = self.part.about = self.writer.publish(manifest, names)
        self._changed = self.part.changed = False
        if self.upgrade is not None:
            self.upgrade.changed = False
        self._published = self._state()

    def _state(self) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, int]]:
        """What may differ from the published although no item did."""
        return copy.deepcopy(self.settings), list(self.skipped), dict(self.unfinished)
