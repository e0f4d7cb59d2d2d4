"""The vectors of one encoder in an index that was opened, with the FAISS index over them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from mmalign.errors import IndexDamagedError, InputError

from . import faiss_index
from .calibration import Calibration
from .row_search import search_rows
from .storage import Manifest, Store, verify_command
from .vectors import ChosenRows, Vectors

__all__ = ["Partition", "SearchedRows"]


class SearchedRows:
    """Rows with a FAISS index over them; mapped into memory, shared by threads.

    Attributes:
        about: has `faiss`, what the manifest says of that index.
        dim: width of the rows.
        vectors: the rows.
    """

    vectors: Vectors | ChosenRows
    dim: int

    def __init__(self, store: Store, manifest: Manifest, about: dict[str, Any]) -> None:
        self.store, self.manifest, self.about = store, manifest, about

    def __len__(self) -> int:
        return len(self.vectors)

    @cached_property
    def faiss(self) -> Any:
        """The FAISS index over the first `about["faiss"]["rows"]` rows, mapped; `None` if there is none.

        Nor is there one if two newer generations were published before it was open: it is gone then, and the
        vectors, which are held, must do.
        """
        about, folder = self.about["faiss"], self.store.folder
        if about is None:
            return None
        try:
            index = faiss_index.read(folder / about["file"], about["parameters"])
        except IndexDamagedError:
            # Asked afterwards: a writer may clear the file between a look at it and its opening.
            if not (folder / about["file"]).exists() and self.store.is_superseded(self.manifest):
                return None
            raise
        if index.ntotal != about["rows"] or index.d != self.dim:
            raise IndexDamagedError(
                f"{about['file']} holds {index.ntotal} rows of {index.d}, the manifest says {about['rows']} of "
                f"{self.dim}; {verify_command(folder, repair=True)} rebuilds it"
            )
        return index

    def search(
        self,
        queries: Float[np.ndarray, "q dim"],
        k: int,
        allowed: Bool[np.ndarray, " rows"],
        *,
        kept: int | None = None,
        exact: bool = False,
    ) -> tuple[Float[np.ndarray, "q k"], Int[np.ndarray, "q k"]]:
        """Exact cosines and rows of the k best allowed rows; see `retrieval.row_search.search_rows`."""
        return search_rows(
            self.vectors,
            queries,
            k,
            allowed=allowed,
            kept=kept,
            about=None if exact else self.about["faiss"],
            index=lambda: self.faiss,
        )


class Partition(SearchedRows):
    """What the manifest, or its entry `upgrade`, says of the vectors of one encoder.

    Attributes:
        calibration: chance levels of cosines.
    """

    vectors: Vectors

    def __init__(self, store: Store, manifest: Manifest, about: dict[str, Any]) -> None:
        super().__init__(store, manifest, about)
        self.dim = int(about["encoder"]["dim"])
        self.vectors = Vectors([store.folder / segment["file"] for segment in about["segments"]], self.dim)
        self.calibration = Calibration.from_dict(about["calibration"])
        if len(self.vectors) != about["rows"]:
            raise IndexDamagedError(
                f"index {str(store.folder)!r}: {len(self.vectors)} vectors, the manifest says {about['rows']}; index "
                "the folder again"
            )

    def reference_queries(self) -> Float[np.ndarray, "references dim"] | None:
        """Unit rows of the text queries that tune and calibrate it; `None` where its encoder takes no text."""
        about = self.about["queries"]
        return np.load(self.store.folder / about["file"], allow_pickle=False) if about else None

    def check_queries(self, queries: np.ndarray) -> Float[np.ndarray, "q dim"]:
        """Queries as a search takes them.

        Raises:
            InputError: another width, or a row that is not of length 1.
        """
        queries = np.asarray(queries)
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise InputError(f"queries have shape {queries.shape}; the index takes [n, {self.dim}]")
        queries = np.ascontiguousarray(queries, np.float32)
        norms = np.einsum("qd,qd->q", queries, queries)
        if not np.all(np.abs(norms - 1) < 1e-2):
            bad = int(np.argmax(~(np.abs(norms - 1) < 1e-2)))
            raise InputError(f"query {bad} has length {norms[bad] ** 0.5:g}; normalise queries to length 1")
        return queries

    def inconsistencies(self) -> Iterator[tuple[str, str]]:
        """Yield the files that contradict themselves or the manifest, and how."""
        for first, piece in self.vectors.chunks():
            norms = np.linalg.norm(piece, axis=1)
            bad = np.flatnonzero(~(np.abs(norms - 1) < 1e-3))
            if len(bad):
                segment = int(np.searchsorted(self.vectors.starts, first, side="right")) - 1
                name = self.about["segments"][segment]["file"]
                yield name, f"has {len(bad)} vectors that are not of unit length (first: row {first + bad[0]})"
                break
        try:
            _ = self.faiss
        except IndexDamagedError as error:
            yield self.about["faiss"]["file"], f"does not fit: {error}"
