"""How one search is carried out: which rows are asked through FAISS, which are scanned, and what is filtered when."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from . import faiss_index
from .exact import exact_search, merge_top, rescore
from .vectors import ChosenRows, Vectors

__all__ = ["search_rows"]

# Up to so many kept rows, or so small a share of all, an exact scan of them beats any index.
_SCAN_ROWS = 20_000
_SCAN_SHARE = 0.1
_MOST = 0.7  # but where nearly all are kept, fetching a few more is quicker than any scan


def search_rows(
    vectors: Vectors | ChosenRows,
    queries: Float[np.ndarray, "q dim"],
    k: int,
    *,
    allowed: Bool[np.ndarray, " rows"],
    kept: int | None,
    about: dict[str, Any] | None,
    index: Callable[[], Any],
) -> tuple[Float[np.ndarray, "q k"], Int[np.ndarray, "q k"]]:
    """Exact cosines and rows of the k best allowed rows for each query; row -1 pads short results.

    FAISS is asked without any filter. The k best of an unfiltered ranking that pass a filter are the k best that pass,
    so it is enough to fetch more and to count; where too few of them pass, the kept rows are scanned.

    Args:
        vectors: all rows.
        queries: unit rows.
        k: results a query.
        allowed: rows that may be returned.
        kept: how many these are, if known.
        about: the manifest's entry on the FAISS index; `None` scans everything.
        index: gives the FAISS index, loaded when first needed, or `None` if it is no longer there.
    """
    total = len(vectors)
    kept = int(np.count_nonzero(allowed)) if kept is None else kept
    wanted = min(k, kept)
    if not wanted:
        return np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1, np.int64)
    filtered = kept < total

    def scan(queries: np.ndarray, start: int = 0) -> tuple[np.ndarray, np.ndarray]:
        rows = start + np.flatnonzero(allowed[start:]) if filtered or start else None
        return exact_search(vectors, queries, k, rows=rows)

    few = filtered and kept <= max(_SCAN_ROWS, _SCAN_SHARE * total) and kept < _MOST * total
    if about is None or few:
        return scan(queries)
    approximate = index()
    if approximate is None:
        return scan(queries)
    depth = about["candidates"] * k
    if filtered:
        depth = int(1.5 * depth * total / kept)
    _, found = faiss_index.search(approximate, queries, min(about["rows"], max(depth, wanted)))
    if filtered:
        found = np.where((found >= 0) & allowed[found], found, -1)
    scores, rows = rescore(vectors, queries, found, k)
    if about["rows"] < total:
        scores, rows = merge_top(scores, rows, *scan(queries, about["rows"]), k)
    short = np.flatnonzero((rows >= 0).sum(axis=1) < wanted)
    if len(short):
        scores[short], rows[short] = scan(queries[short])
    return scores, rows
