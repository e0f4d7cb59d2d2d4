"""Ranks by counting: where each relevant item stands, without sorting the gallery.

    rank = 1 + #(score > s) + #(items with score == s that come first under the tie policy)

`s` is read from the same score row that is counted, so that equality is exact. Methods card "retrieval
metrics", sections 3 and 5.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Bool, Float, Int

from mmalign.checks import at_least
from mmalign.errors import InputError

from ._arrays import as_numpy, as_rows, unit_rows

Ties = Literal["index", "pessimistic", "optimistic", "expected"]
ScoreBlocks = Iterator[Float[np.ndarray, "chunk gallery"]]
Ids = Int[np.ndarray, " item"]

BLOCK_ELEMENTS = 2**24  # scores held at once: 64 MiB in float32, 16 queries against a million items


@dataclass(frozen=True)
class RankedItems:
    """The items that matter to a metric, flat: one entry per (query, item), by query and then by rank."""

    query: Int[np.ndarray, " entry"]
    rank: Float[np.ndarray, " entry"]  # 1-based; inf when the item is not in a truncated list
    gain: Float[np.ndarray, " entry"]


@dataclass(frozen=True)
class TieGroup:
    """The tie group that holds the best relevant item of each query (zeros where there is none)."""

    above: Int[np.ndarray, " query"]  # items scored strictly higher
    size: Int[np.ndarray, " query"]
    relevant: Int[np.ndarray, " query"]

    def hit(self, k: int, ties: Literal["pessimistic", "optimistic"]) -> Bool[np.ndarray, " query"]:
        """Whether a relevant item is in the top k when it comes last, or first, inside its tie group."""
        first = self.above + 1 + (self.size - self.relevant if ties == "pessimistic" else 0)
        return (first <= k) & (self.relevant > 0)


def rank_relevant(
    blocks: ScoreBlocks,
    positives: Sequence[Ids],
    *,
    exclude: Sequence[Ids] | None = None,
    graded: Sequence[tuple[Ids, Float[np.ndarray, " item"]]] | None = None,
    ties: Ties = "index",
) -> tuple[RankedItems, RankedItems | None, TieGroup]:
    """Ranks of the positives, of the graded items if any, and the decisive tie group of each query.

    With `ties="expected"` only the tie group has a meaning; ranks are then those of "index".
    """
    relevant = _Entries()
    by_grade = _Entries()
    group = np.zeros((3, len(positives)), dtype=np.int64)
    query = 0
    for block in blocks:
        for scores in block:
            ids = positives[query]
            graded_ids, gains = graded[query] if graded is not None else (ids[:0], np.zeros(0))
            if exclude is not None and exclude[query].size:
                gone = exclude[query]
                scores = np.delete(scores, gone)
                ids = _positions_after_removal(ids, gone)[0]
                graded_ids, stays = _positions_after_removal(graded_ids, gone)
                gains = gains[stays]
            if ids.size:
                values = scores[ids]
                above, size = _count(scores, values)
                relevant.add(query, _rank(scores, ids, np.ones(ids.size), above, size, ties), np.ones(ids.size))
                best = int(values.argmax())
                group[:, query] = above[best], size[best], np.count_nonzero(values == values[best])
            if graded_ids.size:
                above, size = _count(scores, scores[graded_ids])
                by_grade.add(query, _rank(scores, graded_ids, gains, above, size, ties), gains)
            query += 1
    return relevant.sorted(), by_grade.sorted() if graded is not None else None, TieGroup(*group)


def score_blocks(
    scores: Any, queries: Any, gallery: Any, *, normalize: bool = True, chunk_size: int | None = None
) -> tuple[int, int, ScoreBlocks]:
    """Number of queries, number of gallery items, and the scores a block of queries at a time."""
    if (scores is None) == (queries is None) or (queries is None) != (gallery is None):
        raise InputError("give either scores, or both queries and gallery")
    if scores is not None:
        matrix = as_numpy(scores)
        if matrix.ndim != 2:
            raise InputError(f"scores must be a matrix [query, gallery], not of shape {matrix.shape}")
        if not np.issubdtype(matrix.dtype, np.floating):
            matrix = matrix.astype(np.float64)
        return matrix.shape[0], matrix.shape[1], _checked(_split(matrix, chunk_size, matrix.shape[1]))

    query_rows, gallery_rows = as_rows(queries, "queries"), as_rows(gallery, "gallery")
    if query_rows.shape[1] != gallery_rows.shape[1]:
        raise InputError(f"queries have {query_rows.shape[1]} dimensions, the gallery {gallery_rows.shape[1]}")
    if normalize:
        query_rows, gallery_rows = unit_rows(query_rows, "queries"), unit_rows(gallery_rows, "gallery")
    return (
        query_rows.shape[0],
        gallery_rows.shape[0],
        _checked(_products(_split(query_rows, chunk_size, gallery_rows.shape[0]), gallery_rows)),
    )


def check_ties(ties: str) -> None:
    """Raise unless `ties` names a policy."""
    if ties not in get_args(Ties):
        raise InputError(f"ties={ties!r} is not one of {', '.join(get_args(Ties))}")


class _Entries:
    """Grows a `RankedItems` query by query."""

    def __init__(self) -> None:
        self.sizes: list[tuple[int, int]] = []
        self.ranks: list[np.ndarray] = []
        self.gains: list[np.ndarray] = []

    def add(self, query: int, rank: np.ndarray, gain: np.ndarray) -> None:
        order = np.argsort(rank, kind="stable")
        self.sizes.append((query, rank.size))
        self.ranks.append(rank[order].astype(np.float64))
        self.gains.append(gain[order].astype(np.float64))

    def sorted(self) -> RankedItems:
        if not self.sizes:
            return RankedItems(np.zeros(0, np.int64), np.zeros(0), np.zeros(0))
        query, size = np.array(self.sizes, dtype=np.int64).T
        return RankedItems(np.repeat(query, size), np.concatenate(self.ranks), np.concatenate(self.gains))


def _count(
    scores: Float[np.ndarray, " gallery"], values: Float[np.ndarray, " item"]
) -> tuple[Int[np.ndarray, " item"], Int[np.ndarray, " item"]]:
    """How many scores are above each value, and how many equal it."""
    if values.size <= 8:
        higher = [np.count_nonzero(scores > value) for value in values]
        return np.array(higher), np.array([np.count_nonzero(scores == value) for value in values])
    levels, level_of = np.unique(values, return_inverse=True)
    place = np.searchsorted(levels, scores)  # scores > levels[j] exactly where place > j
    above = scores.size - np.cumsum(np.bincount(place, minlength=levels.size))[: levels.size]
    tied = levels[np.minimum(place, levels.size - 1)] == scores
    return above[level_of], np.bincount(place[tied], minlength=levels.size)[level_of]


def _rank(
    scores: Float[np.ndarray, " gallery"],
    ids: Ids,
    gains: Float[np.ndarray, " item"],
    above: Int[np.ndarray, " item"],
    size: Int[np.ndarray, " item"],
    ties: Ties,
) -> Int[np.ndarray, " item"]:
    """1-based rank of each item; items outside `ids` have gain 0."""
    values = scores[ids]
    if ties in ("index", "expected"):
        rank = above + 1
        for value in np.unique(values[size > 1]):
            here = values == value
            rank[here] += np.searchsorted(np.flatnonzero(scores == value), ids[here])
        return rank
    order = np.lexsort((-gains if ties == "optimistic" else gains, -values))
    start = np.searchsorted(-values[order], -values[order])
    rank = np.empty(ids.size, dtype=np.int64)
    rank[order] = above[order] + 1 + np.arange(ids.size) - start
    if ties == "pessimistic":
        listed = np.searchsorted(-values[order], -values, side="right") - np.searchsorted(-values[order], -values)
        rank += size - listed
    return rank


def _positions_after_removal(ids: Ids, gone: Ids) -> tuple[Ids, Bool[np.ndarray, " item"]]:
    """Where the items stand once the sorted, distinct `gone` are deleted, and which of them survive."""
    stays = ~np.isin(ids, gone)
    return ids[stays] - np.searchsorted(gone, ids[stays]), stays


def _split(rows: np.ndarray, chunk_size: int | None, width: int) -> Iterator[np.ndarray]:
    at_least("chunk_size", chunk_size)
    step = chunk_size or max(1, BLOCK_ELEMENTS // max(1, width))
    return (rows[start : start + step] for start in range(0, len(rows), step))


def _products(query_blocks: Iterator[np.ndarray], gallery: Float[np.ndarray, "gallery dim"]) -> ScoreBlocks:
    """Inner products in which equal gallery rows score equal to the last bit.

    A matrix product does not promise that: the columns at the edge of a tile may be summed in another
    order, and a tie of two copies of an image, or of a whole collapsed gallery, would go unseen. So copies
    are scored once.
    """
    first, copy_of = _distinct_rows(gallery)
    if first.size == len(gallery):
        yield from (block @ gallery.T for block in query_blocks)
    else:
        distinct = gallery[first]
        yield from ((block @ distinct.T)[:, copy_of] for block in query_blocks)


def _distinct_rows(rows: Float[np.ndarray, "row dim"]) -> tuple[np.ndarray, np.ndarray]:
    """Index of the first copy of each distinct row, and for every row which of those it equals."""
    rows = np.ascontiguousarray(rows)
    bits = rows.view(f"u{rows.dtype.itemsize}")
    factor = np.random.default_rng(0).integers(1, 2**63, size=rows.shape[1], dtype=np.uint64) | np.uint64(1)
    with np.errstate(over="ignore"):
        key = np.concatenate(
            [bits[start : start + 4096].astype(np.uint64) @ factor for start in range(0, len(rows), 4096)]
            or [np.zeros(0, np.uint64)]
        )
    first, copy_of = np.unique(key, return_index=True, return_inverse=True)[1:]
    repeated = np.flatnonzero(first[copy_of] != np.arange(len(rows)))
    if not (rows[repeated] == rows[first[copy_of[repeated]]]).all():  # two rows share a hash: 1 in 10^7 at 10^6 rows
        first, copy_of = np.unique(rows, axis=0, return_index=True, return_inverse=True)[1:]
    return first, copy_of.reshape(-1)


def _checked(blocks: ScoreBlocks) -> ScoreBlocks:
    start = 0
    for block in blocks:
        bad = np.isnan(block)
        if bad.any():
            row, column = np.argwhere(bad)[0]
            raise InputError(
                f"the score of query {start + row} (row) and gallery item {column} (column) is NaN; "
                "correct it, or use -inf for an item that must not be found"
            )
        start += len(block)
        yield block
