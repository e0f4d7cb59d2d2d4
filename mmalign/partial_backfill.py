"""Which stored vectors to embed anew first, and what retrieval is worth meanwhile.

Partial backfill of "lambda-Orthogonality Regularization for Compatible Representation Learning", arXiv 2509.16664,
section 3.6: a gallery is replaced item by item in some order, and measured along the way. The order by class means is
the paper's; by density and by access are ours, for galleries without labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
from jaxtyping import Float, Int, Shaped
from scipy.integrate import trapezoid

from .checks import at_least, in_range, one_of
from .errors import InputError
from .metrics._arrays import as_numpy, as_rows, unit_rows

__all__ = [
    "DISTANCES",
    "ORDERS",
    "backfill_order",
    "backfilling_curve",
    "class_mean_distances",
    "class_means",
    "curve_area",
    "local_density",
    "mixed_gallery",
]

ORDERS = ("random", "class_mean", "density", "access")
DISTANCES = ("l2", "cosine")

Distance: TypeAlias = Literal["l2", "cosine"]
Rows: TypeAlias = Float[np.ndarray, "n d"]

BLOCK_ELEMENTS = 1 << 24  # numbers held at once


def backfill_order(
    how: str | Callable[[Rows], Float[np.ndarray, " n"]],
    rows: Rows,
    *,
    labels: Shaped[np.ndarray, " n"] | None = None,
    counts: Shaped[np.ndarray, " n"] | None = None,
    density: Float[np.ndarray, " n"] | None = None,
    distance: Distance = "l2",
    neighbours: int = 10,
    seed: int = 0,
) -> Int[np.ndarray, " n"]:
    """The rows in the order in which to embed them anew; among equals the lower index comes first.

    Args:
        how: one of
            "class_mean": the farthest from the mean of their class first (arXiv 2509.16664, section 3.6); the choice
                where labels are known;
            "density": the loneliest first, those with the lowest `local_density`; needs nothing else;
            "access": the most often asked for first;
            "random": what the others have to beat;
            or a function that gives one key a row, the highest first.
        rows: the stored vectors as they are searched now: forward-mapped old ones, or raw.
        labels: one class a row, for "class_mean".
        counts: how often a row was a result, for "access".
        density: for "density", where it is known already; otherwise it is computed.
        distance: for "class_mean"; the paper finds "l2" slightly better in top-1, "cosine" in mAP.
        neighbours: for "density".
        seed: for "random".

    Raises:
        InputError: what the order needs is missing or does not fit the rows, a key is not finite, or another word.
    """
    rows = as_rows(rows, "rows")
    n = len(rows)
    if callable(how):
        return _descending(_keys("the keys of the function", how(rows), n))
    one_of("how", how, ORDERS)
    if how == "random":
        at_least("seed", seed, 0)
        return np.random.default_rng(seed).permutation(n).astype(np.int64)
    if how == "class_mean":
        if labels is None:
            raise InputError('order "class_mean" needs labels, one class a row; give them, or take "density"')
        return _descending(_keys("distances to class means", class_mean_distances(rows, labels, distance=distance), n))
    if how == "access":
        if counts is None:
            raise InputError('order "access" needs counts, how often each row was a result; give them')
        return _descending(_keys("counts", counts, n))
    return _descending(-_keys("density", local_density(rows, neighbours=neighbours) if density is None else density, n))


def class_mean_distances(
    rows: Rows, labels: Shaped[np.ndarray, " n"], *, distance: Distance = "l2"
) -> Float[np.ndarray, " n"]:
    """Distance of every row to the mean of its class, arXiv 2509.16664, section 3.6.

    Args:
        rows: the gallery.
        labels: one class a row.
        distance: "l2", at least 0, or "cosine", 1 - cos, in [0, 2].

    Raises:
        InputError: labels do not fit the rows, another distance, or "cosine" of a row or a mean that is zero.
    """
    one_of("distance", distance, DISTANCES)
    rows = as_rows(rows, "rows")
    _, means = class_means(rows, labels)
    of_row = np.unique(as_numpy(labels), return_inverse=True)[1].reshape(-1)
    if distance == "cosine":
        means = unit_rows(means, "class means")
    found = np.empty(len(rows))
    step = max(1, BLOCK_ELEMENTS // rows.shape[1])
    for start in range(0, len(rows), step):
        block, own = rows[start : start + step].astype(np.float64), means[of_row[start : start + step]]
        if distance == "cosine":
            found[start : start + step] = 1 - (unit_rows(block, "rows") * own).sum(axis=1)
        else:
            found[start : start + step] = np.linalg.norm(block - own, axis=1)
    return found


def class_means(
    rows: Rows, labels: Shaped[np.ndarray, " n"]
) -> tuple[Shaped[np.ndarray, " classes"], Float[np.ndarray, "classes d"]]:
    """The classes in ascending order, and the mean of each in float64, not normalised.

    Raises:
        InputError: labels do not fit the rows.
    """
    rows, labels = as_rows(rows, "rows"), as_numpy(labels)
    if labels.shape != (len(rows),):
        raise InputError(f"labels have shape {labels.shape}; give one class for each of {len(rows)} rows")
    if not len(rows):
        raise InputError("there are no rows to take class means of; give one or more")
    order = np.argsort(labels, kind="stable")
    classes, starts, sizes = np.unique(labels[order], return_index=True, return_counts=True)
    means = np.empty((len(classes), rows.shape[1]))
    for at, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        means[at] = rows[order[start : start + size]].mean(axis=0, dtype=np.float64)
    return classes, means


def local_density(rows: Rows, *, neighbours: int = 10) -> Float[np.ndarray, " n"]:
    """Mean cosine of every row to the nearest others, in [-1, 1]. Exact; time grows with n^2, memory does not.

    Raises:
        InputError: neighbours is not in [1, n - 1], or a row is zero or NaN.
    """
    unit = unit_rows(as_rows(rows, "rows"), "rows")
    at_least("neighbours", neighbours)
    n = len(unit)
    if neighbours >= n:
        raise InputError(f"neighbours is {neighbours}, and each of {n} rows has {n - 1}; give less, or more rows")
    found = np.empty(n)
    step = max(1, BLOCK_ELEMENTS // n)
    for start in range(0, n, step):
        cosine = unit[start : start + step] @ unit.T
        own = np.arange(len(cosine))
        cosine[own, start + own] = -np.inf
        cosine.partition(n - neighbours, axis=1)
        found[start : start + step] = cosine[:, n - neighbours :].mean(axis=1, dtype=np.float64)
    return found


def backfilling_curve(
    old: Rows,
    new: Rows,
    order: Int[np.ndarray, " n"],
    measure: Callable[[Rows], float],
    shares: Sequence[float] | Float[np.ndarray, " shares"],
) -> Float[np.ndarray, " shares"]:
    """What `measure` says of the gallery at every backfilled share: see `mixed_gallery` and `curve_area`.

    Raises:
        InputError: as `mixed_gallery`.
    """
    return np.array([measure(mixed_gallery(old, new, order, share)) for share in as_numpy(shares).tolist()], np.float64)


def mixed_gallery(old: Rows, new: Rows, order: Int[np.ndarray, " n"], share: float) -> Rows:
    """A copy of the old rows in which the first floor(share * n) of the order are the new ones.

    A share is taken to be meant up to 1e-12, so that 0.29 of 100 rows are 29, and not 28 by the rounding of floats.

    Args:
        old: the gallery before: forward-mapped old vectors, or raw.
        new: the gallery after, backward-mapped new vectors of the same items.
        order: every row once, such as from `backfill_order`.
        share: in [0, 1].

    Raises:
        InputError: the shapes differ, the order does not name every row once, or the share is out of range.
    """
    old, new, order = as_rows(old, "old"), as_rows(new, "new"), as_numpy(order)
    if old.shape != new.shape:
        raise InputError(
            f"old has shape {old.shape}, new {new.shape}; give the same items in the same order, mapped to one width"
        )
    n = len(old)
    whole = np.issubdtype(order.dtype, np.integer) and order.shape == (n,)
    if not whole or not np.array_equal(np.sort(order), np.arange(n)):
        raise InputError(f"the order has shape {order.shape}; it must name each of {n} rows once")
    in_range("share", share, 0, 1)
    first = order[: min(n, int((share + 1e-12) * n))]
    mixed = old.astype(np.result_type(old, new))
    mixed[first] = new[first]
    return mixed


def curve_area(
    shares: Sequence[float] | Float[np.ndarray, " shares"], values: Sequence[float] | Float[np.ndarray, " shares"]
) -> tuple[float, float]:
    """A backfilling curve in one number: the mean over its shares, and the integral by trapezoids.

    The mean stands for E[M(gallery_beta)], beta ~ U[0, 1], of arXiv 2509.16664 where the shares are an even grid from
    0 to 1, ends included; so does the integral, with half the weight on both ends. Say which of them is reported.

    Raises:
        InputError: not one finite value for each of two or more ascending shares.
    """
    x, y = (as_numpy(side).astype(np.float64) for side in (shares, values))
    if x.ndim != 1 or x.shape != y.shape or len(x) < 2:
        raise InputError(f"shares have shape {x.shape}, values {y.shape}; give one value for each of 2 or more shares")
    if not (np.isfinite(x).all() and np.isfinite(y).all() and (np.diff(x) > 0).all()):
        raise InputError("shares must ascend, and every value must be finite; sort the shares, leave out what failed")
    return float(y.mean()), float(trapezoid(y, x))


def _keys(name: str, values: Any, n: int) -> Float[np.ndarray, " n"]:
    keys = as_numpy(values)
    if keys.shape != (n,):
        raise InputError(f"{name} have shape {keys.shape}; give one number for each of {n} rows")
    keys = keys.astype(np.float64)
    if not np.isfinite(keys).all():
        bad = int((~np.isfinite(keys)).argmax())
        raise InputError(f"{name}: row {bad} has {keys[bad]}; give finite numbers")
    return keys


def _descending(keys: Float[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    return np.argsort(-keys, kind="stable").astype(np.int64)
