"""Whether models that follow each other can search each other's galleries, and what a user notices of the change.

Average compatibility and accuracy over models as in "Stationary Representations", CVPR 2024; the criterion and the
update gain of backward-compatible training (BCT). M(a, b) is a retrieval measure of queries by model a on the gallery
of model b. Methods card "backward-compatible representations", section 5.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Shaped

from mmalign.checks import in_range
from mmalign.errors import InputError

from ._arrays import as_numpy

__all__ = ["CompatibilityResult", "FlipRates", "compatibility", "flip_rates", "update_gain"]


class CompatibilityResult(NamedTuple):
    """What a matrix of models says; T models, oldest first.

    `incompatible[i, j]`, i > j, is True where queries of model i on the gallery of j are no better than those of j
    itself; all else is False. `average_compatibility` (AC) is the share of the pairs that are compatible, in [0, 1];
    `average_accuracy` (AM, or AA) the mean of the T (T + 1) / 2 entries in percent. `prefix_compatibility` has the
    AC of the first 2, 3, ..., T models, `prefix_accuracy` the AM of the first 1, 2, ..., T.
    """

    incompatible: Bool[np.ndarray, "models models"]
    average_compatibility: float
    average_accuracy: float
    prefix_compatibility: Float[np.ndarray, " models-1"]
    prefix_accuracy: Float[np.ndarray, " models"]


class FlipRates(NamedTuple):
    """Shares of all queries: misses that became hits, and hits that became misses, which is what users notice."""

    positive: float
    negative: float


def compatibility(matrix: Float[np.ndarray, "models models"]) -> CompatibilityResult:
    """AC = 2 / (T (T - 1)) #{i > j : C_ij > C_jj},   AM = 200 / (T (T + 1)) sum_{i >= j} C_ij.

    Equal is not compatible. What is above the diagonal is not read.

    Args:
        matrix: C_ij = M(i, j) in [0, 1], a row for the model of the queries, a column for that of the gallery.

    Raises:
        InputError: the matrix is not square, has fewer than two models, or an entry is outside [0, 1].
    """
    values = as_numpy(matrix).astype(np.float64)
    if values.ndim != 2 or values.shape[0] != values.shape[1] or len(values) < 2:
        raise InputError(f"the matrix has shape {values.shape}; give a row and a column each for 2 or more models")
    models = len(values)
    lower = np.tril(np.ones((models, models), bool))
    bad = np.argwhere(lower & ~((values >= 0) & (values <= 1)))
    if len(bad):
        i, j = bad[0].tolist()
        raise InputError(f"entry {i}, {j} of the matrix is {values[i, j]:g}; give fractions in [0, 1], not percent")
    below = np.tril(lower, -1)
    incompatible = below & (values <= values.diagonal())
    counts = np.arange(1, models + 1)
    good = (below & ~incompatible).sum(axis=1).cumsum()[1:]
    prefix_compatibility = good / (counts * (counts - 1) / 2)[1:]
    prefix_accuracy = 100 * np.where(lower, values, 0).sum(axis=1).cumsum() / (counts * (counts + 1) / 2)
    return CompatibilityResult(
        incompatible,
        float(prefix_compatibility[-1]),
        float(prefix_accuracy[-1]),
        prefix_compatibility,
        prefix_accuracy,
    )


def flip_rates(old_hits: Shaped[np.ndarray, " query"], new_hits: Shaped[np.ndarray, " query"]) -> FlipRates:
    """Flips of the hit@k of the same queries before and after a change; positive - negative is the change of hit@k.

    Args:
        old_hits: whether each query had a hit before, True or 1.
        new_hits: and after.

    Raises:
        InputError: not one hit or miss of both for each query, or no query.
    """
    old, new = as_numpy(old_hits), as_numpy(new_hits)
    if old.ndim != 1 or old.shape != new.shape or not old.size:
        raise InputError(f"old_hits have shape {old.shape}, new_hits {new.shape}; give one each for the same queries")
    for name, hits in (("old_hits", old), ("new_hits", new)):
        wrong = ~np.isin(hits, (0, 1))
        if wrong.any():
            at = int(wrong.argmax())
            raise InputError(f"{name} of query {at} is {hits[at]}; give True for a hit and False for a miss")
    before, after = old.astype(bool), new.astype(bool)
    return FlipRates(float((~before & after).mean()), float((before & ~after).mean()))


def update_gain(old_old: float, new_old: float, new_new: float) -> float:
    """(M(new, old) - M(old, old)) / (M(new, new) - M(old, old)): the share of the gain had without embedding anew.

    1 where new queries do as well on the old gallery as on their own, 0 where no better than old ones, below 0 where
    worse. After BCT.

    Raises:
        InputError: a number is not finite, or M(new, new) is not above M(old, old): no gain to have a share of.
    """
    for name, value in (("old_old", old_old), ("new_old", new_old), ("new_new", new_new)):
        in_range(name, value)
    if new_new <= old_old:
        raise InputError(
            f"new_new is {new_new:g} and old_old {old_old:g}: the new model is no better on its own gallery, so there "
            "is no gain to take a share of; keep the old model"
        )
    return float((new_old - old_old) / (new_new - old_old))
