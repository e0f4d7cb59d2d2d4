"""From ranks to metrics, one value per query. Methods card "retrieval metrics", section 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float

from mmalign.errors import InputError

from .ranking import RankedItems, TieGroup

Gain = Literal["linear", "exponential"]
MapDenominator = Literal["min(R,k)", "R"]
PerQuery = dict[str, Float[np.ndarray, " query"]]


def binary_metrics(items: RankedItems, n_query: int, ks: Sequence[int], map_denominator: MapDenominator) -> PerQuery:
    """first_rank, rr, ap, hit@k, recall@k, precision@k, ap@k, r_precision and ap@r; NaN if no positive."""

    def total(weights: Float[np.ndarray, " entry"]) -> Float[np.ndarray, " query"]:
        return np.bincount(items.query, weights=weights, minlength=n_query)

    if map_denominator not in ("min(R,k)", "R"):
        raise InputError(f"map_denominator={map_denominator!r} is neither 'min(R,k)' nor 'R'")
    n_relevant = np.bincount(items.query, minlength=n_query)
    r = np.where(n_relevant > 0, n_relevant, np.nan)
    first = np.cumsum(n_relevant) - n_relevant
    best = np.full(n_query, np.nan)
    best[n_relevant > 0] = items.rank[first[n_relevant > 0]]
    precision = (np.arange(items.rank.size) - first[items.query] + 1) / items.rank  # P@j at each relevant item

    out = {"first_rank": best, "rr": 1 / best, "ap": total(precision) / r}
    for k in ks:
        top = items.rank <= k
        n_top = total(top)
        out[f"hit@{k}"] = np.where(n_relevant > 0, n_top > 0, np.nan)
        out[f"recall@{k}"] = n_top / r
        out[f"precision@{k}"] = np.where(n_relevant > 0, n_top / k, np.nan)
        out[f"ap@{k}"] = total(precision * top) / (np.minimum(r, k) if map_denominator == "min(R,k)" else r)
    within_r = items.rank <= n_relevant[items.query]
    out["r_precision"] = total(within_r) / r
    out["ap@r"] = total(precision * within_r) / r
    return out


def ndcg(items: RankedItems, n_query: int, ks: Sequence[int], gain: Gain) -> PerQuery:
    """nDCG@k; NaN for a query whose ideal DCG is 0."""
    if gain not in ("linear", "exponential"):
        raise InputError(f"gain={gain!r} is neither 'linear' nor 'exponential'")
    gains = items.gain if gain == "linear" else np.exp2(items.gain) - 1
    ideal_order = np.lexsort((-gains, items.query))
    count = np.bincount(items.query, minlength=n_query)
    ideal_rank = np.arange(gains.size) - (np.cumsum(count) - count)[items.query] + 1

    def dcg(rank: Float[np.ndarray, " entry"], gains: Float[np.ndarray, " entry"], k: int) -> np.ndarray:
        return np.bincount(items.query, weights=np.where(rank <= k, gains / np.log2(rank + 1), 0.0), minlength=n_query)

    out = {}
    for k in ks:
        ideal = dcg(ideal_rank, gains[ideal_order], k)
        out[f"ndcg@{k}"] = dcg(items.rank, gains, k) / np.where(ideal > 0, ideal, np.nan)
    return out


def expected_hit(group: TieGroup, k: int) -> Float[np.ndarray, " query"]:
    """P(hit@k) when the s = k - above slots that reach into the tie group are filled at random."""
    hit = np.full(group.above.size, np.nan)
    for query in np.flatnonzero(group.relevant):
        size, relevant = int(group.size[query]), int(group.relevant[query])
        slots = k - int(group.above[query])
        if slots <= 0:
            hit[query] = 0.0
        elif slots >= size:
            hit[query] = 1.0
        else:
            hit[query] = 1 - math.comb(size - relevant, slots) / math.comb(size, slots)
    return hit
