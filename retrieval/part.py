"""The vectors of one encoder while an index is being changed, and the entry of the manifest that speaks of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Bool

from .storage import Writer
from .vectors import Vectors, write_rows

__all__ = ["Part"]


class Part:
    """New rows are queued in memory until `flush`; rows that are on disk stay there.

    Attributes:
        about: the manifest itself, or its entry `upgrade`: both have `encoder`, `segments`, `rows`, and what is derived
            from the vectors: `queries`, `faiss`, `calibration`, `measured`.
        dim: width of the vectors.
        segments: files with their numbers of rows, in order.
        rows: on disk and queued.
        changed: whether there is something that has not been published.
    """

    def __init__(self, writer: Writer, about: dict[str, Any]) -> None:
        self.writer = writer
        self.about = about
        self.dim = int(about["encoder"]["dim"])
        self.segments: list[dict[str, Any]] = list(about["segments"])
        self.rows: int = sum(segment["rows"] for segment in self.segments)
        self.changed = False
        self._pending: list[np.ndarray] = []

    def add_rows(self, vectors: np.ndarray) -> int:
        """Queue unit rows; returns the row number of the first."""
        first = self.rows
        if len(vectors):
            self._pending.append(vectors)
            self.rows += len(vectors)
            self.changed = True
        return first

    def stream_rows(self, pieces: Iterable[np.ndarray], rows: int) -> None:
        """Write many unit rows straight to disk as a segment of their own."""
        self.flush()
        if rows:
            self._add_segment(pieces, rows)
            self.rows += rows
            self.changed = True

    def rewrite(self, kept: Bool[np.ndarray, " rows"], *, manifest: dict[str, Any]) -> None:
        """Write the rows that are kept into one segment, and forget the others."""
        vectors = self.vectors()
        self.writer.require_intact(manifest, [segment["file"] for segment in self.segments])

        def pieces() -> Iterator[np.ndarray]:
            for first, piece in vectors.stream():
                yield piece[kept[first : first + len(piece)]]

        self.segments, self.rows = [], int(kept.sum())
        if self.rows:
            self._add_segment(pieces(), self.rows)
        self.changed = True

    def vectors(self) -> Vectors:
        """All rows; queued ones are written first."""
        self.flush()
        return Vectors([self.writer.folder / segment["file"] for segment in self.segments], self.dim)

    def flush(self) -> None:
        """Write what is queued."""
        if self._pending:
            self._add_segment(self._pending, sum(map(len, self._pending)))
            self._pending = []

    def record(self) -> list[str]:
        """Bring the entry up to date; returns the files that it names."""
        self.flush()
        self.about["segments"], self.about["rows"] = self.segments, self.rows
        derived = [self.about[name]["file"] for name in ("queries", "faiss") if self.about[name]]
        return [segment["file"] for segment in self.segments] + derived

    def _add_segment(self, pieces: Iterable[np.ndarray], rows: int) -> None:
        name = self.writer.add("vectors", lambda file: write_rows(file, pieces, rows, self.dim))
        self.segments.append({"file": name, "rows": rows})
