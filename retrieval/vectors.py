"""Raw embeddings on disk: memory-mapped `.npy` segments that look like one array."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from jaxtyping import Float, Int
from numpy.lib import format as npy

from mmalign.errors import IndexDamagedError, InputError

__all__ = ["ChosenRows", "Vectors", "as_rows", "checked_rows", "write_rows"]


class Vectors:
    """Rows of one or more segments, read where needed and never all at once."""

    def __init__(self, paths: Sequence[Path], dim: int) -> None:
        self.dim = dim
        self.segments: list[np.ndarray] = []
        self._places: list[tuple[Path, int]] = []
        for path in paths:
            try:
                segment = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError) as error:
                raise IndexDamagedError(f"{str(path)!r} cannot be read ({error}); index the folder again") from None
            if segment.ndim != 2 or segment.shape[1] != dim or segment.dtype != np.float32:
                raise IndexDamagedError(
                    f"{str(path)!r} holds {segment.dtype} {segment.shape}, expected float32 rows of {dim}; "
                    "index the folder again"
                )
            # np.memmap pays for its bookkeeping on every slice; the plain view over the same pages does not.
            self.segments.append(segment.view(np.ndarray))
            self._places.append((path, segment.offset))
        self.starts = np.cumsum([0, *(len(segment) for segment in self.segments)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def gather(self, rows: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n dim"]:
        """Copies of the given rows."""
        if len(self.segments) == 1:
            return self.segments[0][rows]
        result = np.empty((len(rows), self.dim), np.float32)
        owner = np.searchsorted(self.starts, rows, side="right") - 1
        for number in np.unique(owner):
            mine = owner == number
            result[mine] = self.segments[number][rows[mine] - self.starts[number]]
        return result

    def chunks(
        self, start: int = 0, stop: int | None = None, size: int = 65_536
    ) -> Iterator[tuple[int, Float[np.ndarray, "n dim"]]]:
        """Yield (first row, view) pieces of at most `size` rows."""
        stop = len(self) if stop is None else stop
        for number, segment in enumerate(self.segments):
            first = int(self.starts[number])
            low, high = max(start, first), min(stop, first + len(segment))
            for position in range(low, high, size):
                yield position, segment[position - first : min(position + size, high) - first]

    def stream(
        self, start: int = 0, stop: int | None = None, size: int = 65_536
    ) -> Iterator[tuple[int, Float[np.ndarray, "n dim"]]]:
        """As `chunks`, but read instead of mapped: a pass over everything that keeps nothing in memory."""
        stop = len(self) if stop is None else stop
        for number, (path, offset) in enumerate(self._places):
            first = int(self.starts[number])
            low, high = max(start, first), min(stop, int(self.starts[number + 1]))
            for position in range(low, high, size):
                count = min(position + size, high) - position
                begin = offset + (position - first) * self.dim * 4
                yield position, np.fromfile(path, np.float32, count * self.dim, offset=begin).reshape(count, self.dim)


class ChosenRows:
    """Some rows of others, numbered anew; read as `Vectors` are."""

    def __init__(self, vectors: Vectors, rows: Int[np.ndarray, " chosen"]) -> None:
        """Rows are given in rising order."""
        self.dim = vectors.dim
        self._vectors, self._rows = vectors, rows

    def __len__(self) -> int:
        return len(self._rows)

    def gather(self, rows: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n dim"]:
        """Copies of the given rows."""
        return self._vectors.gather(self._rows[rows])

    def chunks(
        self, start: int = 0, stop: int | None = None, size: int = 65_536
    ) -> Iterator[tuple[int, Float[np.ndarray, "n dim"]]]:
        """Yield (first row, copy) pieces of at most `size` rows."""
        stop = len(self) if stop is None else stop
        for position in range(start, stop, size):
            yield position, self.gather(np.arange(position, min(position + size, stop)))

    stream = chunks


def write_rows(file: IO[bytes], pieces: Iterable[np.ndarray], rows: int, dim: int) -> None:
    """Write float32 pieces as one `.npy` array without holding them together."""
    npy.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (rows, dim)})
    written = 0
    for piece in pieces:
        if len(piece):  # memoryviews of nothing cannot be cast
            file.write(np.ascontiguousarray(piece, dtype="<f4").data.cast("B"))
        written += len(piece)
    if written != rows:
        raise ValueError(f"{written} rows written, {rows} announced")


def as_rows(vectors: Any) -> Any:
    """What a user calls vectors, as something of shape [n, dim] that can be sliced; memory-mapped arrays stay so.

    Raises:
        InputError: it has no such shape.
    """
    if not hasattr(vectors, "shape"):
        try:
            vectors = np.asarray(vectors)
        except ValueError:
            raise InputError("vectors are rows of different lengths; give [n, dim]") from None
    if len(vectors.shape) != 2:
        raise InputError(f"vectors have shape {tuple(vectors.shape)}; give [n, dim]")
    return vectors


def checked_rows(vectors: np.ndarray, dim: int | None = None, *, first: int = 0) -> Float[np.ndarray, "n dim"]:
    """A user's vectors as unit rows in float32. `first` is the number that messages give to the first row.

    Raises:
        InputError: not two-dimensional, another width, or rows that are not finite or are zero (named).
    """
    rows = np.asarray(vectors)
    if rows.ndim != 2 or rows.dtype.kind not in "fiu":
        raise InputError(f"vectors have shape {rows.shape} and dtype {rows.dtype}; give numbers of shape [n, dim]")
    if dim is not None and rows.shape[1] != dim:
        raise InputError(f"vectors have {rows.shape[1]} columns, the index has {dim}; use the encoder of the index")
    rows = rows.astype(np.float32, copy=False)
    norms = np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64))
    bad = np.flatnonzero(~np.isfinite(norms) | (norms == 0))
    if len(bad):
        named = ", ".join(map(str, first + bad[:5])) + ("..." if len(bad) > 5 else "")
        raise InputError(f"{len(bad)} of {len(rows)} vectors are zero or not finite (rows {named}); remove them")
    if np.all(np.abs(norms - 1) < 1e-6):
        return rows
    return (rows / norms[:, None]).astype(np.float32)
