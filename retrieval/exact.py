"""Exact scores in plain numpy: scanning rows, replacing approximate scores, joining two rankings."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from .vectors import ChosenRows, Vectors

__all__ = ["exact_search", "merge_top", "rescore"]


def exact_search(
    vectors: Vectors | ChosenRows,
    queries: Float[np.ndarray, "q dim"],
    k: int,
    *,
    rows: Int[np.ndarray, " kept"] | None = None,
    start: int = 0,
    stop: int | None = None,
    mapped: bool = True,
) -> tuple[Float[np.ndarray, "q k"], Int[np.ndarray, "q k"]]:
    """Inner products with all rows in [start, stop), or with the given ones; the k best, row -1 as padding.

    `mapped=False` reads all rows through a buffer: slower when repeated, but a single pass keeps nothing in memory.
    """
    best_scores = np.full((len(queries), 0), -np.inf, np.float32)
    best_rows = np.zeros((len(queries), 0), np.int64)
    if rows is None:
        pass_over = vectors.chunks if mapped else vectors.stream
        pieces = ((np.arange(first, first + len(piece)), piece) for first, piece in pass_over(start, stop))
    else:
        pieces = ((part, vectors.gather(part)) for part in np.array_split(rows, max(1, len(rows) // 65_536)))
    for numbers, piece in pieces:
        scores = queries @ piece.T
        if scores.shape[1] > k:
            top = np.argpartition(-scores, k - 1, axis=1)[:, :k]
            scores = np.take_along_axis(scores, top, axis=1)
            numbers = numbers[top]
        else:
            numbers = np.broadcast_to(numbers, scores.shape)
        best_scores, best_rows = merge_top(best_scores, best_rows, scores, numbers, k)
    return _padded(best_scores, best_rows, k)


def merge_top(
    scores: np.ndarray, rows: np.ndarray, other_scores: np.ndarray, other_rows: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k best of two lists, ties by lower row."""
    if scores.shape[1]:
        scores = np.concatenate([scores, other_scores], axis=1)
        rows = np.concatenate([rows, other_rows], axis=1)
    else:
        scores, rows = other_scores, other_rows
    order = np.lexsort((rows, -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)


def rescore(
    vectors: Vectors | ChosenRows, queries: Float[np.ndarray, "q dim"], rows: Int[np.ndarray, "q c"], k: int
) -> tuple[Float[np.ndarray, "q k"], Int[np.ndarray, "q k"]]:
    """Replace approximate scores by exact inner products and keep the k best; row -1 stays last."""
    if len(queries) == 1:
        found = rows[0][rows[0] >= 0]  # what a filter has taken out leaves gaps, not only at the end
        exact = vectors.gather(found) @ queries[0]
        order = np.lexsort((found, -exact))[:k]
        scores, kept = exact[None, order], found[None, order]
    else:
        scores = np.full(rows.shape, -np.inf, np.float32)
        for number, query in enumerate(queries):
            valid = rows[number] >= 0
            scores[number, valid] = vectors.gather(rows[number, valid]) @ query
        order = np.lexsort((rows, -scores), axis=1)[:, :k]
        scores, kept = np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)
    return _padded(scores, kept, k)


def _padded(scores: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """k columns: -inf and row -1 where there are fewer results."""
    short = k - scores.shape[1]
    if short <= 0:
        return scores, rows
    widths = ((0, 0), (0, short))
    return np.pad(scores, widths, constant_values=-np.inf), np.pad(rows, widths, constant_values=-1)
