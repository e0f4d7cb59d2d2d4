"""The next generation of an index while it is being made: what every writing operation works on."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa

from mmalign.encoders import Encoder
from mmalign.errors import IndexDamagedError, InputError

from . import faiss_index
from .calibration import Calibration, query_bank
from .items import SCHEMA, ItemColumns, Items, read_arrow, write_arrow
from .storage import Manifest, Store, Writer
from .vectors import Vectors, checked_rows, write_rows

__all__ = ["Draft", "resolve_roots", "store_roots"]

# Rows past the FAISS index are scanned exactly: 2,000 cost 0.2 ms a query. Beyond this share they are merged in.
MERGE_SHARE = 0.05
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
        self.dim = int(manifest["encoder"]["dim"])
        self.segments: list[dict[str, Any]] = list(manifest["segments"])
        self.items = ItemColumns()
        writer.require_intact(manifest, [manifest[name] for name in ("items", "metadata", "skipped") if manifest[name]])
        if manifest["items"]:
            stored = Items(read_arrow(self.folder / manifest["items"], SCHEMA), [])
            self.items = ItemColumns.of(stored)
        self.skipped: list[dict[str, Any]] = read_skipped(self.folder, manifest)
        self.pending: list[np.ndarray] = []
        self.rows = sum(segment["rows"] for segment in self.segments)
        self._checkpoint_seconds = checkpoint_seconds
        self._last_checkpoint = time.monotonic()
        self._changed = False
        self.first_settings: dict[str, Any] = copy.deepcopy(manifest["settings"])
        self._published = self.first_settings, list(self.skipped)

    @classmethod
    def start(cls, store: Store, writer: Writer, encoder: dict[str, Any], roots: list[Path], **options: Any) -> Draft:
        """The draft of a new index."""
        manifest: Manifest = {
            "encoder": encoder,
            "roots": store_roots(roots, store.folder),
            "segments": [],
            "items": None,
            "metadata": None,
            "skipped": None,
            "queries": None,
            "faiss": None,
            "calibration": None,
            "next_id": 0,
            "settings": {},
            "measured": {},
        }
        draft = cls(writer, manifest, **options)
        draft.touch()  # even an index of nothing is to be written: one of many shards may find no files
        return draft

    # -- changing --------------------------------------------------------------------------------------------------

    def add_rows(self, vectors: np.ndarray) -> int:
        """Queue unit rows; returns the row number of the first."""
        first = self.rows
        if len(vectors):
            self.pending.append(vectors)
            self.rows += len(vectors)
            self._changed = True
        return first

    def stream_rows(self, pieces: Iterable[np.ndarray], rows: int) -> None:
        """Write many unit rows straight to disk as a segment of their own."""
        self._flush()
        if rows:
            self._add_segment(pieces, rows)
            self.rows += rows
            self._changed = True

    def add_item(self, **values: Any) -> int:
        """Append a line to the item table; returns its id."""
        number = int(self.manifest["next_id"])
        self.manifest["next_id"] = number + 1
        self.items.append(id=number, **values)
        self._changed = True
        return number

    def touch(self) -> None:
        """Say that the item table or another part was changed in place."""
        self._changed = True

    def set_metadata(self, table: pa.Table | None) -> None:
        """Replace the user's columns (with `id`)."""
        if table is None:
            self.manifest["metadata"] = None
        else:
            self.manifest["metadata"] = self.writer.add("metadata", ".arrow", lambda file: write_arrow(table, file))
        self._changed = True

    def metadata(self) -> pa.Table | None:
        """The user's columns as stored."""
        name = self.manifest["metadata"]
        return read_arrow(self.folder / name) if name else None

    def vectors(self) -> Vectors:
        """All rows written so far; queued rows are written first."""
        self._flush()
        return Vectors([self.folder / segment["file"] for segment in self.segments], self.dim)

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
        if self._changed or (self.manifest["settings"], self.skipped) != self._published:
            self._flush()
            table = self.items.to_table()
            self.manifest["items"] = self.writer.add("items", ".arrow", lambda file: write_arrow(table, file))
            self.manifest["skipped"] = self._write_skipped()
            self._publish()
        self._last_checkpoint = time.monotonic()

    def finish(
        self,
        encoder: Encoder | None,
        *,
        factory: str | None = None,
        wanted_recall: float | None = None,
        text_queries: np.ndarray | None = None,
        memory_bytes: int | None = None,
        force: bool = False,
        progress: bool = False,
    ) -> None:
        """Drop dead rows, join segments, bring FAISS and calibration up to date, publish.

        What is given of `factory`, `wanted_recall`, `text_queries` and `memory_bytes` holds from now on.

        Args:
            encoder: embeds the reference queries the first time; `None` where there is none.
            factory: a FAISS factory string, instead of the choice by size; "auto" goes back to that.
            wanted_recall: recall@10 to tune for; 0.95 unless ever given.
            text_queries: the user's own unit rows to tune with, instead of the built-in phrases.
            memory_bytes: what the FAISS index may take.
            force: rebuild FAISS even if nothing asks for it.
            progress: show a bar.
        """
        settings = self.manifest["settings"]
        given = {"factory": factory, "wanted_recall": wanted_recall, "memory_bytes": memory_bytes}
        changed = {name: value for name, value in given.items() if value is not None and settings.get(name) != value}
        settings.update(changed)
        if factory == "auto":
            del settings["factory"]
        force = force or text_queries is not None or "wanted_recall" in changed
        self._compact()
        vectors = self.vectors()
        speaks = encoder is not None and "text" in encoder.modalities
        if len(vectors) and self._faiss_is_stale(force or (speaks and self.manifest["queries"] is None)):
            if text_queries is not None:
                self.write_queries(checked_rows(text_queries, self.dim))
            elif self.manifest["queries"] is None and encoder is not None and "text" in encoder.modalities:
                self.write_queries(encoder.encode_texts(query_bank(self.rows)))
            self._build_faiss(vectors, force, progress)
            alive = np.zeros(len(vectors), bool)
            alive[self.items.row] = True
            calibration = Calibration.measure(vectors, alive, self._queries())
            self.manifest["calibration"] = calibration.to_dict() if calibration else None
        if not len(vectors):
            self.manifest["faiss"] = self.manifest["calibration"] = None
        self.checkpoint()

    def _faiss_is_stale(self, force: bool) -> bool:
        current = self.manifest["faiss"]
        if force or current is None:
            self._changed = True
            return True
        plan = self._plan()
        grown = self.rows - current["rows"] > MERGE_SHARE * self.rows
        return grown or not self._same_type(plan)

    def _plan(self) -> faiss_index.Plan:
        settings = self.manifest["settings"]
        factory, memory_bytes = settings.get("factory"), settings.get("memory_bytes")
        with self._old_factory_forgiven():
            return faiss_index.choose_plan(self.rows, self.dim, factory=factory, memory_bytes=memory_bytes)
        return faiss_index.choose_plan(self.rows, self.dim, memory_bytes=memory_bytes)

    def _old_factory_forgiven(self) -> contextlib.AbstractContextManager[None]:
        """A factory string chosen in an earlier run, perhaps for more rows than there are now, must not stop this."""
        factory = self.manifest["settings"].get("factory")
        forgiven = factory is not None and factory == self.first_settings.get("factory")
        return contextlib.suppress(*([InputError] if forgiven else []))

    def _same_type(self, plan: faiss_index.Plan) -> bool:
        """Whether the current FAISS file is what the plan asks for; a chosen number of lists may lag behind growth."""
        current = self.manifest["faiss"]
        if plan.factory == self.manifest["settings"].get("factory"):
            return bool(plan.factory == current["factory"])
        return bool(plan.factory.split(",")[-1] == current["factory"].split(",")[-1])

    def _build_faiss(self, vectors: Vectors, force: bool, progress: bool) -> None:
        rows = len(vectors)
        plan = self._plan()
        settings = self.manifest["settings"]
        current = self.manifest["faiss"]
        trained_on = rows
        if current and not force and self._same_type(plan) and rows <= 2 * current["trained_on"]:
            trained_on = current["trained_on"]
            plan = replace(plan, factory=current["factory"], parameters=current["parameters"])
            self.writer.require_intact(self.manifest, [current["file"]])
            index = faiss_index.grow(self.folder / current["file"], vectors, current["rows"], rows)
        else:
            index = None
            with self._old_factory_forgiven():
                index = faiss_index.build(vectors, rows, plan, progress=progress)
            if index is None:
                plan = faiss_index.choose_plan(rows, self.dim, memory_bytes=settings.get("memory_bytes"))
                index = faiss_index.build(vectors, rows, plan, progress=progress)
        queries = self._queries()
        kind = "text" if queries is not None else "image"
        if queries is None:
            queries = noisy_rows(vectors)
        tuning = faiss_index.tune(
            index, vectors, rows, queries, plan, kind=kind, wanted=settings.get("wanted_recall", 0.95)
        )
        self.manifest["faiss"] = {
            "file": self.writer.add("faiss", ".index", lambda file: faiss_index.write(index, file)),
            "factory": plan.factory,
            "rows": rows,
            "trained_on": trained_on,
            "parameters": tuning.parameters,
            "candidates": tuning.candidates,
        }
        self.manifest["measured"] = tuning.to_dict()
        self._changed = True

    def _compact(self) -> None:
        """Rewrite the vectors without dead rows, or into one segment, where that pays."""
        self._flush()
        alive = np.zeros(self.rows, bool)
        alive[self.items.row] = True
        dead = self.rows - int(alive.sum())
        if dead <= DEAD_SHARE * self.rows and len(self.segments) <= MAX_SEGMENTS:
            return
        vectors = self.vectors()
        self.writer.require_intact(self.manifest, [segment["file"] for segment in self.segments])
        if dead <= DEAD_SHARE * self.rows:
            alive[:] = True  # joining alone keeps row numbers, and with them the FAISS file
        rows = int(alive.sum())

        def pieces() -> Iterator[np.ndarray]:
            for first, piece in vectors.stream():
                yield piece[alive[first : first + len(piece)]]

        if rows < self.rows:
            renumbered = np.cumsum(alive) - 1
            self.items.row = [int(renumbered[row]) for row in self.items.row]
            self.manifest["faiss"] = None
        self.segments = []
        self.rows = rows
        if rows:
            self._add_segment(pieces(), rows)
        self._changed = True

    def _flush(self) -> None:
        if self.pending:
            rows = sum(len(piece) for piece in self.pending)
            self._add_segment(self.pending, rows)
            self.pending = []

    def _add_segment(self, pieces: Iterable[np.ndarray], rows: int) -> None:
        name = self.writer.add("vectors", ".npy", lambda file: write_rows(file, pieces, rows, self.dim))
        self.segments.append({"file": name, "rows": rows})

    def _write_skipped(self) -> str | None:
        if not self.skipped:
            return None

        def fill(file: IO[bytes]) -> None:
            for line in self.skipped:
                file.write(json.dumps(line).encode("ascii") + b"\n")

        return self.writer.add("skipped", ".jsonl", fill)

    def write_queries(self, queries: np.ndarray) -> None:
        """Keep unit rows of reference text queries, for tuning and calibration."""
        self.manifest["queries"] = self.writer.add(
            "vectors", ".npy", lambda file: write_rows(file, [queries], len(queries), self.dim)
        )

    def _queries(self) -> np.ndarray | None:
        name = self.manifest["queries"]
        return np.load(self.folder / name, allow_pickle=False) if name else None

    def _publish(self) -> None:
        manifest = self.manifest
        manifest["segments"] = self.segments
        manifest["rows"] = self.rows
        manifest["item_count"] = len(self.items)
        single = [manifest[name] for name in ("items", "metadata", "skipped", "queries")]
        names = [segment["file"] for segment in self.segments] + [name for name in single if name]
        names += [manifest["faiss"]["file"]] if manifest["faiss"] else []
        self.manifest = self.writer.publish(manifest, names)
        self._changed = False
        self._published = copy.deepcopy(manifest["settings"]), list(self.skipped)


def noisy_rows(vectors: Vectors, count: int = 200, noise: float = 0.5, seed: int = 0) -> np.ndarray:
    """Queries like stored images but not equal to any: stored rows plus Gaussian noise of half their norm."""
    random = np.random.default_rng(seed)
    rows = vectors.gather(np.sort(random.choice(len(vectors), min(count, len(vectors)), replace=False)))
    rows = rows + noise * random.standard_normal(rows.shape, np.float32) / np.sqrt(np.float32(vectors.dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def read_skipped(folder: Path, manifest: Manifest) -> list[dict[str, Any]]:
    """The report of files that could not be read."""
    name = manifest.get("skipped")
    if not name:
        return []
    try:
        return [json.loads(line) for line in (folder / name).read_text(encoding="ascii").splitlines()]
    except FileNotFoundError:
        raise IndexDamagedError(
            f"{str(folder / name)!r} is gone; `refresh()` if the index has been written since it was opened, else "
            "`mmalign verify INDEX --repair`"
        ) from None
    except ValueError:
        raise IndexDamagedError(
            f"{str(folder / name)!r} is damaged; `mmalign verify INDEX --repair` drops it"
        ) from None


def store_roots(roots: list[Path], folder: Path) -> list[dict[str, str]]:
    """Roots as they go into the manifest: absolute, and relative to the index so that both can move together."""
    stored = []
    for root in roots:
        try:
            relative = os.path.relpath(root.resolve(), folder.resolve())
        except ValueError:  # another drive on Windows
            relative = ""
        inside = root.resolve() in folder.resolve().parents
        below = os.path.relpath(folder.resolve(), root.resolve()) if inside else ""
        stored.append({"absolute": os.fspath(root.resolve()), "relative": relative, "index_below": below})
    return stored


def resolve_roots(stored: list[dict[str, str]], folder: Path) -> list[Path]:
    """Where the indexed folders are now.

    The recorded place if it still exists, else beside the moved index; but an index inside an indexed folder belongs
    to the folder it is in, or a copy of both would answer with the original's files.
    """
    found = []
    for root in stored:
        absolute = Path(root["absolute"])
        beside = Path(os.path.normpath(folder.resolve() / root["relative"])) if root["relative"] else absolute
        below = root.get("index_below", "")
        inside = bool(below) and beside / below == folder.resolve()
        found.append(beside if beside.exists() and (inside or not absolute.exists()) else absolute)
    return found
