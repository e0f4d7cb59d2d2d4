"""OPIS: how differently one threshold serves the classes, arXiv 2307.04047. Lower is better.

An application that calls everything within a distance d a match lets each class have another rate of misses and of
false matches. OPIS is the variance between classes of a utility made of both, averaged over the distances that people
would choose. Methods card "retrieval metrics", section 7. Print it for the old and the new index when an encoder is
exchanged or quantised, with `thresholds`: fixed rules such as "similarity above 0.3" break silently there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from mmalign.checks import at_least, in_range
from mmalign.errors import InputError

from ._arrays import as_numpy, as_rows, unit_rows

BLOCK_ELEMENTS = 2**21  # distances held at once, 16 MiB each for half a dozen arrays
OPERATING_POINTS = (1e-3, 1e-2)  # false-accept rates whose thresholds are reported


class OPISResult(NamedTuple):
    """Distances are Euclidean between unit vectors, in [0, 2]: cosine = 1 - d^2 / 2. Smaller is a match."""

    opis: float  # trapezoid rule over the grid, divided by its width
    grid_mean: float  # the same as the plain mean over the grid
    d_min: float  # distance at the lower false-accept rate
    d_max: float  # at the upper
    grid: Float[np.ndarray, " grid"]  # even, from d_min to d_max
    sensitivity: Float[np.ndarray, "class grid"]  # share of the class's positive pairs within d
    specificity: Float[np.ndarray, "class grid"]  # share of the class's negative pairs beyond d
    utility: Float[np.ndarray, "class grid"]
    mean_utility: Float[np.ndarray, " grid"]
    class_contribution: Float[np.ndarray, " class"]  # mean over the grid of (utility - mean utility)^2
    labels: Shaped[np.ndarray, " class"]  # in ascending order, those with a positive pair
    thresholds: dict[float, float]  # false-accept rate over all classes (1e-3, 1e-2) -> distance
    n_left_out: int  # labels without a positive pair


class _Side(NamedTuple):
    rows: Float[np.ndarray, "item dim"]
    classes: Int[np.ndarray, " item"]
    n_class: int

    def take(self, items: Int[np.ndarray, " some"]) -> _Side:
        return _Side(self.rows[items], self.classes[items], self.n_class)

    @property
    def sizes(self) -> Int[np.ndarray, " class"]:
        return np.bincount(self.classes, minlength=self.n_class)


def opis(
    embeddings: Float[np.ndarray, "item dim"],
    labels: Shaped[np.ndarray, " item"],
    *,
    gallery: Float[np.ndarray, "other dim"] | None = None,
    gallery_labels: Shaped[np.ndarray, " other"] | None = None,
    far: tuple[float, float] = (0.01, 0.1),
    grid_points: int = 51,
    c: float = 1.0,
    max_pairs: int | None = 50_000_000,
    seed: int = 0,
) -> OPISResult:
    """Operating-point-inconsistency score of embeddings with classes.

        U_i(d) = (1 + c^2) se_i sp_i / (c^2 sp_i + se_i),   OPIS = mean_i mean_d (U_i(d) - mean_j U_j(d))^2

    A pair is positive for its class when both members have it and negative for class i when exactly one has it.
    Classes without a positive pair enter the false-accept rate but have no utility.

    Args:
        embeddings: one row an item; normalised inside.
        labels: the class of each, numbers or words.
        gallery: then pairs are (row, gallery row), as between images and texts; without it every two rows.
        gallery_labels: the classes of the gallery rows.
        far: the false-accept rates over all classes between whose distances utility is compared; in (0, 1).
        grid_points: distances looked at, 2 or more.
        c: weight of sensitivity against specificity, above 0. Which of the two it favours is unverified; at 1, the
            harmonic mean, it does not matter.
        max_pairs: above this number of (row, row) pairs, negative pairs are those with a random part of the gallery
            and large classes are thinned out; the noise of that adds to a small score. None: all, in blocks, in time
            that grows with the square.
        seed: of that choice.

    Raises:
        InputError: shapes do not fit, an option is out of its range, there is no positive or no negative pair, or
            `max_pairs` leaves a class without a negative pair.
    """
    in_range("far", far[0], 0, 1)
    in_range("far", far[1], 0, 1)
    if not 0 < far[0] < far[1] < 1:
        raise InputError(f"far is {far}; give two rising rates between 0 and 1")
    at_least("grid_points", grid_points, 2)
    in_range("c", c, 1e-6)
    at_least("max_pairs", max_pairs)
    names, left, right = _sides(embeddings, labels, gallery, gallery_labels)
    within = right is None
    other = left if right is None else right
    rng = np.random.default_rng(seed)

    n_positive = left.sizes * (other.sizes - within)
    kept = np.flatnonzero(n_positive > 0)
    if not kept.size:
        raise InputError("no label has two items to compare; OPIS needs classes with a positive pair")
    columns = _sample(len(left.rows), other, max_pairs, rng)
    distance_at = _thresholds(left, other, columns, within, (*far, *OPERATING_POINTS))
    d_min, d_max = distance_at[far[0]], distance_at[far[1]]
    grid = np.linspace(d_min, d_max, grid_points)

    share = None if max_pairs is None else max_pairs // len(kept)
    sensitivity = np.array([_sensitivity(left, other, int(i), within, grid, share, rng) for i in kept])
    false_accepts, n_negative = _false_accepts(left, other.take(columns), other.sizes, grid)
    if not within:
        rows = _sample(len(other.rows), left, max_pairs, rng)
        more, n_more = _false_accepts(other, left.take(rows), left.sizes, grid)
        # A class may have no negative pair with its member on one of the sides: its weight is 0 there.
        false_accepts = false_accepts * n_negative[:, None] + more * n_more[:, None]
        false_accepts /= np.maximum(n_negative + n_more, 1)[:, None]
    specificity = 1 - false_accepts[kept]

    below = c**2 * specificity + sensitivity
    utility = np.divide((1 + c**2) * sensitivity * specificity, below, out=np.zeros_like(below), where=below > 0)
    mean_utility = utility.mean(axis=0)
    square = (utility - mean_utility) ** 2
    trapezoid = np.full(grid_points, 1 / (grid_points - 1))
    trapezoid[[0, -1]] /= 2
    return OPISResult(
        opis=float((square @ trapezoid).mean()),
        grid_mean=float(square.mean()),
        d_min=d_min,
        d_max=d_max,
        grid=grid,
        sensitivity=sensitivity,
        specificity=specificity,
        utility=utility,
        mean_utility=mean_utility,
        class_contribution=square.mean(axis=1),
        labels=names[kept],
        thresholds={rate: distance_at[rate] for rate in OPERATING_POINTS},
        n_left_out=len(names) - len(kept),
    )


def _sides(embeddings: Any, labels: Any, gallery: Any, gallery_labels: Any) -> tuple[np.ndarray, _Side, _Side | None]:
    if (gallery is None) != (gallery_labels is None):
        raise InputError("only one of gallery and gallery_labels is given; give both or neither")
    rows, classes = [_unit(embeddings, "embeddings")], [as_numpy(labels)]
    if gallery is not None:
        rows.append(_unit(gallery, "gallery"))
        classes.append(as_numpy(gallery_labels))
    for name, matrix, label in zip(("", "gallery_"), rows, classes, strict=False):
        if label.shape != matrix.shape[:1]:
            raise InputError(f"{name}labels have shape {label.shape}; give one for each of the {len(matrix)} rows")
    if rows[0].shape[1] != rows[-1].shape[1]:
        raise InputError(f"embeddings have {rows[0].shape[1]} dimensions, gallery {rows[1].shape[1]}; give the same")
    names, inverse = np.unique(np.concatenate(classes), return_inverse=True)
    left = _Side(rows[0], inverse[: len(rows[0])], len(names))
    return names, left, _Side(rows[1], inverse[len(rows[0]) :], len(names)) if len(rows) == 2 else None


def _unit(values: Any, name: str) -> Float[np.ndarray, "item dim"]:
    return unit_rows(as_rows(values, name).astype(np.float64), name)


def _sample(n: int, side: _Side, max_pairs: int | None, rng: np.random.Generator) -> Int[np.ndarray, " column"]:
    """Items, ascending, such that n rows against them make no more than `max_pairs` pairs; each class in proportion."""
    m = len(side.rows)
    if max_pairs is None or n * m <= max_pairs:
        return np.arange(m)
    size = max(1, max_pairs // n)
    shuffled = rng.permutation(m)
    by_class = shuffled[np.argsort(side.classes[shuffled], kind="stable")]
    evenly = np.floor((np.arange(size) + rng.random()) * (m / size)).astype(np.int64)
    return np.sort(by_class[np.minimum(evenly, m - 1)])


def _blocks(
    left: Float[np.ndarray, "row dim"], right: Float[np.ndarray, "column dim"]
) -> Iterator[tuple[slice, Float[np.ndarray, "some column"]]]:
    """Distances of some rows at a time to all columns."""
    step = max(1, BLOCK_ELEMENTS // max(1, len(right)))
    for start in range(0, len(left), step):
        square = left[start : start + step] @ right.T
        square *= -2
        square += 2
        yield slice(start, start + step), np.sqrt(np.maximum(square, 0, out=square), out=square)


def _thresholds(
    left: _Side, right: _Side, columns: Int[np.ndarray, " column"], within: bool, rates: tuple[float, ...]
) -> dict[float, float]:
    """The distance at each false-accept rate: a quantile, linearly interpolated, over negative pairs taken once.

    Only the smallest distances are kept, as many as the highest rate asks for.
    """
    sampled = right.take(columns)
    n_pairs = len(left.rows) * len(columns) - int(left.sizes @ sampled.sizes)
    if within:
        n_pairs -= (len(columns) ** 2 - int(sampled.sizes @ sampled.sizes)) // 2
    if not n_pairs:
        raise InputError("there is no negative pair; OPIS needs two classes or more (and max_pairs that shows them)")
    n_kept = min(n_pairs, math.floor(max(rates) * (n_pairs - 1)) + 2)
    in_sample: Bool[np.ndarray, " item"] = np.isin(np.arange(len(left.rows)), columns)
    held, size, limit = [np.zeros(0)], 0, np.inf
    for rows, distance in _blocks(left.rows, sampled.rows):
        wanted = (left.classes[rows, None] != sampled.classes) & (distance <= limit)
        if within:  # two sampled items meet twice
            item = np.arange(len(left.rows))[rows, None]
            wanted &= ~in_sample[rows, None] | (item < columns)
        held.append(distance[wanted])
        size += held[-1].size
        if size > 2 * n_kept + BLOCK_ELEMENTS:
            held = [np.partition(np.concatenate(held), n_kept - 1)[:n_kept]]
            size, limit = n_kept, held[0].max()
    smallest = np.sort(np.concatenate(held))[:n_kept]
    positions = np.array(rates) * (n_pairs - 1)
    return dict(zip(rates, np.interp(positions, np.arange(n_kept), smallest).tolist(), strict=True))


def _false_accepts(
    left: _Side, sampled: _Side, sizes: Int[np.ndarray, " class"], grid: Float[np.ndarray, " grid"]
) -> tuple[Float[np.ndarray, "class grid"], Int[np.ndarray, " class"]]:
    """Of pairs (row of the class, column of another): the share within each distance, and how many there are."""
    accepted = np.zeros(left.n_class * len(grid), np.int64)
    for rows, distance in _blocks(left.rows, sampled.rows):
        near = (left.classes[rows, None] != sampled.classes) & (distance <= grid[-1])
        bins = np.searchsorted(grid, distance[near])
        row = np.repeat(left.classes[rows], near.sum(axis=1))
        accepted += np.bincount(row * len(grid) + bins, minlength=accepted.size)
    n_seen = left.sizes * (len(sampled.rows) - sampled.sizes)
    n_all = left.sizes * (sizes.sum() - sizes)
    if (n_seen[n_all > 0] == 0).any():
        raise InputError("max_pairs leaves a class without a negative pair; give a larger one")
    return accepted.reshape(left.n_class, -1).cumsum(axis=1) / np.maximum(n_seen, 1)[:, None], n_all


def _sensitivity(
    left: _Side,
    right: _Side,
    label: int,
    within: bool,
    grid: Float[np.ndarray, " grid"],
    max_pairs: int | None,
    rng: np.random.Generator,
) -> Float[np.ndarray, " grid"]:
    """Share of a class's positive pairs, or of about `max_pairs` of them where there are more, within each distance."""
    rows, columns = np.flatnonzero(left.classes == label), np.flatnonzero(right.classes == label)
    if max_pairs is not None and len(rows) * len(columns) > max_pairs:
        most = max(2, math.isqrt(max_pairs))
        rows = rng.permutation(rows)[:most]
        columns = rows if within else rng.permutation(columns)[:most]
    accepted = np.zeros(len(grid) + 1, np.int64)
    for block, distance in _blocks(left.rows[rows], right.rows[columns]):
        if within:  # an item with itself is no pair
            distance[rows[block, None] == columns] = np.inf
        accepted += np.bincount(np.searchsorted(grid, distance.ravel()), minlength=len(grid) + 1)
    return accepted[:-1].cumsum() / (len(rows) * (len(columns) - within))
