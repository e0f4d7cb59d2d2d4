"""One generation of an index, opened for reading: immutable, shared by threads, good until it is let go."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from numbers import Integral
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float, Int

from mmalign.checks import at_least, in_range
from mmalign.errors import IndexDamagedError, InputError
from mmalign.imaging import DecodeSettings

from .filters import kept_ids
from .hits import Hit
from .items import SCHEMA, Items, display_path, read_arrow
from .partition import Partition
from .query_rows import Found, QueryRows
from .remedies import index_commands
from .roots import names_of, resolve_roots
from .skipped import read_skipped
from .storage import Manifest, Store
from .upgrading.live import LiveUpgrade
from .upgrading.part import read_left_out, read_numbers
from .vectors import Vectors

__all__ = ["Snapshot"]


class Snapshot:
    """What a manifest names, mapped into memory. A writer that publishes a newer one does not disturb it."""

    def __init__(self, store: Store) -> None:
        self.store = store
        while True:
            manifest = store.read_manifest()
            try:
                return self._open(manifest)
            except IndexDamagedError:
                # A writer may have moved on, and cleared files that we were about to open.
                if not store.is_superseded(manifest):
                    raise

    def _open(self, manifest: Manifest) -> None:
        folder = self.store.folder
        self.manifest: Manifest = manifest
        self.roots = resolve_roots(manifest["roots"], folder)
        self.partition = Partition(self.store, manifest, manifest)
        self.store.require_unaltered(manifest, (manifest["items"], manifest["metadata"]))
        table = read_arrow(folder / manifest["items"], SCHEMA) if manifest["items"] else None
        if table is None or table.num_rows != manifest["item_count"]:
            raise IndexDamagedError(
                f"index {str(folder)!r}: items and manifest do not agree in number; index the folder again"
            )
        self.items = Items(table, self.roots)
        self.metadata: pa.Table | None = read_arrow(folder / manifest["metadata"]) if manifest["metadata"] else None
        upgrade = manifest.get("upgrade")
        # Read now, while the files are surely there: later generations clear them.
        self.left_out = read_left_out(folder, upgrade["left_out"]) if upgrade else []
        self.places = read_numbers(folder, upgrade["places"]) if upgrade else None
        running = upgrade is not None and upgrade["stage"] == "running"
        self.upgrade: LiveUpgrade | None = None
        if running:  # not `self.alive`, which would outlive a manifest that turns out to be superseded
            alive = self.items.alive(len(self.vectors))
            self.upgrade = LiveUpgrade(self.store, manifest, self.partition, alive)

    @property
    def dim(self) -> int:
        """Width of the vectors."""
        return self.partition.dim

    @property
    def vectors(self) -> Vectors:
        """All rows; while the encoder is being replaced, those of the old one."""
        return self.partition.vectors

    @cached_property
    def alive(self) -> Bool[np.ndarray, " rows"]:
        """Which vector rows belong to an item."""
        return self.items.alive(len(self.vectors))

    @cached_property
    def alive_count(self) -> int:
        """How many rows these are."""
        return int(np.count_nonzero(self.alive))

    @property
    def decode(self) -> DecodeSettings:
        """How files became pixels; queries must be read in the same way."""
        return DecodeSettings(**self.manifest["settings"]["decode"])

    @property
    def unfinished(self) -> tuple[int, int] | None:
        """Images indexed and image files found, in the folders whose last update was stopped; `None` if none was."""
        found = {int(number): count for number, count in self.manifest.get("unfinished", {}).items()}
        if not found:
            return None
        return int(np.isin(self.items.numbers("root"), list(found)).sum()), sum(found.values())

    def skipped(self) -> list[dict[str, Any]]:
        """Files that could not be read; see `retrieval.skipped`."""
        return read_skipped(self.store.folder, self.manifest)

    def search(
        self,
        query: QueryRows,
        k: int,
        *,
        where: str | Sequence[str] | None = None,
        min_match: float | None = None,
        min_score: float | None = None,
        exact: bool = False,
    ) -> list[Hit]:
        """See `ImageIndex.search`; for one query."""
        at_least("k", k)
        in_range("min_match", min_match, 0, 1)
        in_range("min_score", min_score, -1, 1)
        passing = self.passing(where) if where is not None else None
        mask = self.rows_of(passing) if passing is not None else None
        # Padding for results that cannot be is not worth the memory of a k typed with too many zeros.
        found = self.find(query, min(k, max(1, self.alive_count)), mask=mask, exact=exact)
        return self._hits(found, query.kind, min_match=min_match, min_score=min_score, passing=passing)

    def find(
        self, query: QueryRows, k: int, *, mask: Bool[np.ndarray, " rows"] | None = None, exact: bool = False
    ) -> Found:
        """The k best rows for each of some queries, by both partitions where the encoder is being replaced."""
        if self.upgrade is not None and query.new is not None:
            return self.upgrade.find(query, k, mask=mask, exact=exact)
        assert query.old is not None
        scores, rows = self.search_vectors(query.old, k, mask=mask, exact=exact)
        return Found(scores, rows, self._match(scores, query.kind))

    def search_vectors(
        self,
        queries: Float[np.ndarray, "q dim"],
        k: int,
        *,
        mask: Bool[np.ndarray, " rows"] | None = None,
        exact: bool = False,
    ) -> tuple[Float[np.ndarray, "q k"], Int[np.ndarray, "q k"]]:
        """See `ImageIndex.search_vectors`."""
        at_least("k", k)
        allowed, kept = (self.alive, self.alive_count) if mask is None else (self.alive & mask, None)
        return self.partition.search(self.partition.check_queries(queries), k, allowed, kept=kept, exact=exact)

    def _match(self, scores: np.ndarray, kind: str) -> np.ndarray | None:
        return self.partition.calibration.match(scores, kind) if self.partition.calibration else None

    def passing(self, where: str | Sequence[str]) -> Bool[np.ndarray, " items"]:
        """Items for which the filter holds; see `retrieval.filters.kept_ids`."""
        return np.isin(self.items.numbers("id"), kept_ids(self.items.table, self.metadata, where))

    def rows_of(self, passing: Bool[np.ndarray, " items"]) -> Bool[np.ndarray, " rows"]:
        """Vector rows with at least one of the given items."""
        mask = np.zeros(len(self.vectors), bool)
        mask[self.items.numbers("row")[passing]] = True
        return mask

    def _hits(
        self,
        found: Found,
        kind: str,
        *,
        min_match: float | None = None,
        min_score: float | None = None,
        passing: Bool[np.ndarray, " items"] | None = None,
    ) -> list[Hit]:
        """Results of one query as hits; `passing` says which of several files with equal content may stand for them."""
        if found.matches is None and min_match is not None:
            raise InputError(
                f"this index has no match scores for {kind} queries yet: it has fewer than 8 images, its first build "
                f"was interrupted (run {index_commands(self.manifest, self.store.folder)}), or its encoder takes no "
                "text; leave out --min-match (min_match=...)"
            )
        hits: list[Hit] = []
        for place, row in enumerate(found.rows[0]):
            if row < 0:
                break
            score = float(found.scores[0, place])
            level = None if found.matches is None or np.isnan(found.matches[0, place]) else found.matches[0, place]
            # Not the end: the scores of two partitions are no common scale.
            if min_score is not None and score < min_score:
                continue
            if min_match is not None and level is not None and level < min_match:
                continue
            positions = self.items.positions_of_row(int(row))
            if passing is not None:
                positions = [position for position in positions if passing[position]]
            item = self.items.item(positions[0])
            aliases = tuple(self.items.item(position).path for position in positions[1:])
            by_new = found.by_new is not None and bool(found.by_new[0, place])
            hits.append(
                Hit(
                    len(hits) + 1,
                    score,
                    None if level is None else float(level),
                    item,
                    aliases,
                    self._metadata_of(item.id),
                    by_new,
                )
            )
        return hits

    def _metadata_of(self, number: int) -> dict[str, Any]:
        if self.metadata is None:
            return {}
        row = self._metadata_rows.get(number)
        if row is None:
            return {}
        return {name: self.metadata.column(name)[row].as_py() for name in self.metadata.column_names if name != "id"}

    @cached_property
    def _metadata_rows(self) -> dict[int, int]:
        assert self.metadata is not None
        return {number: row for row, number in enumerate(self.metadata.column("id").to_pylist())}

    def position_of(self, image: int | str | os.PathLike[str]) -> int | None:
        """Line of the item table for an id or a path; `None` if there is none."""
        if isinstance(image, Integral):
            found = np.flatnonzero(self.items.numbers("id") == image)
            return int(found[0]) if len(found) else None
        roots, shown = self.items.numbers("root"), self.items.table.column("name")
        for number, raw in names_of(os.fspath(image), self.roots):  # type: ignore[arg-type]
            matching = pc.equal(shown, display_path(raw)).to_numpy()
            for position in np.flatnonzero(matching & (roots == number)):
                if self.items.raw_name(int(position)) == raw:
                    return int(position)
        return None

    def problems(self, *, progress: bool = False) -> list[tuple[str, str]]:
        """Files that are not what was written, and how; if all are, those that contradict each other."""
        checked = self.store.check_contents(self.manifest, progress=progress)
        return [(name, problem) for name, problem in checked if problem] or list(self.inconsistencies())

    def inconsistencies(self) -> Iterator[tuple[str, str]]:
        """Yield the files that contradict each other or themselves, and how; that each is as written is not checked."""
        rows = self.items.numbers("row")
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self.vectors)):
            yield self.manifest["items"], "names vector rows that do not exist"
        for partition in (self.partition, *([self.upgrade.partition] if self.upgrade else [])):
            yield from partition.inconsistencies()
