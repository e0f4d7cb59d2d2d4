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

from . import faiss_index
from .calibration import Calibration
from .filters import kept_ids
from .hits import Hit
from .items import SCHEMA, Items, display_path, read_arrow
from .remedies import index_commands
from .roots import names_of, resolve_roots
from .row_search import search_rows
from .skipped import read_skipped
from .storage import Manifest, Store, verify_command
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
        self.dim = int(manifest["encoder"]["dim"])
        self.roots = resolve_roots(manifest["roots"], folder)
        self.vectors = Vectors([folder / segment["file"] for segment in manifest["segments"]], self.dim)
        table = read_arrow(folder / manifest["items"], SCHEMA) if manifest["items"] else None
        if table is None or len(self.vectors) != manifest["rows"] or table.num_rows != manifest["item_count"]:
            raise IndexDamagedError(
                f"index {str(folder)!r}: vectors, items and manifest do not agree in number; index the folder again"
            )
        self.items = Items(table, self.roots)
        self.metadata: pa.Table | None = read_arrow(folder / manifest["metadata"]) if manifest["metadata"] else None
        self.calibration = Calibration.from_dict(manifest["calibration"])

    @cached_property
    def alive(self) -> Bool[np.ndarray, " rows"]:
        """Which vector rows belong to an item."""
        return self.items.alive(len(self.vectors))

    @cached_property
    def faiss(self) -> Any:
        """The FAISS index over the first `manifest["faiss"]["rows"]` rows, mapped; `None` if there is none.

        Nor is there one if it was not opened before two newer generations were published: it is gone then, and the
        vectors, which are held, must do.
        """
        about = self.manifest["faiss"]
        if about is None:
            return None
        if not (self.store.folder / about["file"]).exists() and self.store.is_superseded(self.manifest):
            return None
        index = faiss_index.read(self.store.folder / about["file"], about["parameters"])
        if index.ntotal != about["rows"] or index.d != self.dim:
            raise IndexDamagedError(
                f"{about['file']} holds {index.ntotal} rows of {index.d}, the manifest says {about['rows']} of "
                f"{self.dim}; {verify_command(self.store.folder, repair=True)} rebuilds it"
            )
        return index

    @cached_property
    def alive_count(self) -> int:
        """How many rows these are."""
        return int(np.count_nonzero(self.alive))

    def reference_queries(self) -> Float[np.ndarray, "references dim"] | None:
        """Unit rows of the text queries that tune and calibrate the index; `None` where its encoder takes no text."""
        about = self.manifest["queries"]
        return np.load(self.store.folder / about["file"], allow_pickle=False) if about else None

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
        vector: Float[np.ndarray, " dim"],
        kind: str,
        k: int,
        *,
        where: str | Sequence[str] | None = None,
        min_match: float | None = None,
        min_score: float | None = None,
        exact: bool = False,
    ) -> list[Hit]:
        """See `ImageIndex.search`; `kind` says what the vector stands for, "text" or "image"."""
        at_least("k", k)
        in_range("min_match", min_match, 0, 1)
        in_range("min_score", min_score, -1, 1)
        passing = self.passing(where) if where is not None else None
        mask = self.rows_of(passing) if passing is not None else None
        # Padding for results that cannot be is not worth the memory of a k typed with too many zeros.
        depth = min(k, max(1, self.alive_count))
        scores, rows = self.search_vectors(vector[None], depth, mask=mask, exact=exact)
        return self._hits(scores[0], rows[0], kind, min_match=min_match, min_score=min_score, passing=passing)

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
        queries = np.asarray(queries)
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise InputError(f"queries have shape {queries.shape}; the index takes [n, {self.dim}]")
        queries = np.ascontiguousarray(queries, np.float32)
        norms = np.einsum("qd,qd->q", queries, queries)
        if not np.all(np.abs(norms - 1) < 1e-2):
            bad = int(np.argmax(~(np.abs(norms - 1) < 1e-2)))
            raise InputError(f"query {bad} has length {norms[bad] ** 0.5:g}; normalise queries to length 1")
        return search_rows(
            self.vectors,
            queries,
            k,
            allowed=self.alive if mask is None else self.alive & mask,
            kept=self.alive_count if mask is None else None,
            about=None if exact else self.manifest["faiss"],
            index=lambda: self.faiss,
        )

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
        scores: Float[np.ndarray, " k"],
        rows: Int[np.ndarray, " k"],
        kind: str,
        *,
        min_match: float | None = None,
        min_score: float | None = None,
        passing: Bool[np.ndarray, " items"] | None = None,
    ) -> list[Hit]:
        """Results of one query as hits; `passing` says which of several files with equal content may stand for them."""
        known = self.calibration.match(scores, kind) if self.calibration else None
        if known is None and min_match is not None:
            raise InputError(
                f"this index has no match scores for {kind} queries yet: it has fewer than 8 images, its first build "
                f"was interrupted (run {index_commands(self.manifest, self.store.folder)}), or its encoder takes no "
                "text; leave out --min-match (min_match=...)"
            )
        matches = [None] * len(scores) if known is None else known
        hits: list[Hit] = []
        for score, row, match in zip(scores, rows, matches, strict=True):
            if row < 0:
                break
            if min_score is not None and score < min_score:
                break
            if min_match is not None and match is not None and match < min_match:
                break
            positions = self.items.positions_of_row(int(row))
            if passing is not None:
                positions = [position for position in positions if passing[position]]
            item = self.items.item(positions[0])
            aliases = tuple(self.items.item(position).path for position in positions[1:])
            level = None if match is None else float(match)
            hits.append(Hit(len(hits) + 1, float(score), level, item, aliases, self._metadata_of(item.id)))
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
        starts = self.vectors.starts
        for first, piece in self.vectors.chunks():
            norms = np.linalg.norm(piece, axis=1)
            bad = np.flatnonzero(~(np.abs(norms - 1) < 1e-3))
            if len(bad):
                segment = int(np.searchsorted(starts, first, side="right")) - 1
                name = self.manifest["segments"][segment]["file"]
                yield name, f"has {len(bad)} vectors that are not of unit length (first: row {first + bad[0]})"
                break
        try:
            _ = self.faiss
        except IndexDamagedError as error:
            yield self.manifest["faiss"]["file"], f"does not fit: {error}"
