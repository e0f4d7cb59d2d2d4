"""Retrieval metrics: hit@k, recall@k, precision@k, AP, RR, nDCG@k, R-precision, MAP@R, median rank.

Definitions follow the methods card "retrieval metrics", section 1. Two of them are often confused: `hit@k`
(the "R@k" of CLIP papers) asks whether any relevant item is in the top k, `recall@k` which fraction of them
is. With five captions per image recall@1 cannot exceed 0.2.

Everything follows from the ranks of the relevant items, which `ranking` counts without sorting the gallery.
Accumulation is in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from mmalign.errors import InputError

from ._arrays import as_numpy, as_rows
from .measures import Gain, MapDenominator, PerQuery, binary_metrics, expected_hit, ndcg
from .ranking import RankedItems, Ties, check_ties, rank_relevant, score_blocks

Positives = Sequence[Sequence[int] | Int[np.ndarray, " item"]]
Grades = Float[np.ndarray, "query gallery"] | Sequence[Mapping[int, float]]

BOOTSTRAP_BELOW = 5000  # "auto" gives intervals where fewer queries than this are averaged over


def evaluate(
    scores: Float[np.ndarray, "query gallery"] | None = None,
    *,
    queries: Float[np.ndarray, "query dim"] | None = None,
    gallery: Float[np.ndarray, "gallery dim"] | None = None,
    positives: Positives,
    ks: Sequence[int] = (1, 5, 10),
    ties: Ties = "index",
    exclude: Positives | None = None,
    grades: Grades | None = None,
    gain: Gain = "linear",
    map_denominator: MapDenominator = "min(R,k)",
    normalize: bool = True,
    chunk_size: int | None = None,
    bootstrap: int | Literal["auto"] = 0,
    seed: int = 0,
) -> dict[str, float]:
    """Every metric averaged over the queries that have a positive.

    Give `scores`, or `queries` and `gallery`: embeddings compared by cosine (by inner product with
    `normalize=False`) a block of queries at a time, so that the gallery may have millions of rows. Arrays
    may be torch tensors.

    - `positives`: per query the gallery rows that are relevant; see `positives_from_labels`.
    - `exclude`: per query the gallery rows taken out before ranking, such as the query's own copy; see
      `exclude_same_item`. An excluded row is no positive either.
    - `ties`: "index" puts the lower gallery row first; "pessimistic" and "optimistic" put relevant items
      last or first inside a tie (with `grades`, in order of grade). "expected" is hit@k under a random
      order of ties, in closed form; there the other metrics have no agreed definition and are left out of
      the result.
    - `grades`: graded relevance for nDCG only, dense or a mapping {gallery row: grade} per query; without
      it nDCG is binary. `gain` is the grade itself ("linear") or 2^grade - 1 ("exponential").
    - `map_denominator`: AP@k is divided by min(R, k) as in landmark retrieval, or by R as in trec_eval.
    - `bootstrap`: number of resamples over queries for 95% intervals `<metric>_low`, `<metric>_high`;
      "auto" is 1,000 for fewer than 5,000 queries and none from there on.

    Keys: hit@k, recall@k, precision@k, map, map@k, mrr, ndcg@k, r_precision, map@r, medr, mnr; n_query
    (queries averaged over), n_skipped (queries without a positive), n_ndcg_skipped (queries with no
    positive grade), n_gallery (before exclusion) and n_ties_at_k (queries whose hit@k depends on the order
    of ties; many of them are a sign of collapsed or quantised embeddings). In all of them k is a number:
    "hit@5", "n_ties_at_5".
    """
    if scores is not None:
        scores = as_numpy(scores)
    per_query = per_query_metrics(
        scores,
        queries=queries,
        gallery=gallery,
        positives=positives,
        ks=ks,
        ties=ties,
        exclude=exclude,
        grades=grades,
        gain=gain,
        map_denominator=map_denominator,
        normalize=normalize,
        chunk_size=chunk_size,
    )
    n_gallery = scores.shape[1] if scores is not None else len(gallery) if gallery is not None else 0
    return _averages(per_query, bootstrap, seed) | {"n_gallery": n_gallery}


def per_query_metrics(
    scores: Float[np.ndarray, "query gallery"] | None = None,
    *,
    queries: Float[np.ndarray, "query dim"] | None = None,
    gallery: Float[np.ndarray, "gallery dim"] | None = None,
    positives: Positives,
    ks: Sequence[int] = (1, 5, 10),
    ties: Ties = "index",
    exclude: Positives | None = None,
    grades: Grades | None = None,
    gain: Gain = "linear",
    map_denominator: MapDenominator = "min(R,k)",
    normalize: bool = True,
    chunk_size: int | None = None,
) -> PerQuery:
    """The values that `evaluate` averages, one per query; NaN for a query that has no positive.

    Keys: hit@k, recall@k, precision@k, ap, ap@k, rr, ndcg@k, r_precision, ap@r, first_rank (1-based rank of
    the best positive) and tie@k (1 where hit@k depends on the order of ties). `ties="expected"` gives hit@k
    and tie@k.
    """
    check_ties(ties)
    ks = _cutoffs(ks)
    if ties == "expected" and grades is not None:
        raise InputError("ties='expected' is defined for hit@k only; leave grades out or choose another policy")
    n_query, n_gallery, blocks = score_blocks(scores, queries, gallery, normalize=normalize, chunk_size=chunk_size)
    relevant, graded, group = rank_relevant(
        blocks,
        _id_lists(positives, n_query, n_gallery, "positives"),
        exclude=_id_lists(exclude, n_query, n_gallery, "exclude") if exclude is not None else None,
        graded=_graded_lists(grades, n_query, n_gallery) if grades is not None else None,
        ties=ties,
    )
    if ties == "expected":
        per_query = {f"hit@{k}": expected_hit(group, k) for k in ks}
    else:
        per_query = binary_metrics(relevant, n_query, ks, map_denominator)
        per_query |= ndcg(relevant if graded is None else graded, n_query, ks, gain)
    for k in ks:
        depends = group.hit(k, "optimistic") != group.hit(k, "pessimistic")
        per_query[f"tie@{k}"] = np.where(group.relevant > 0, depends, np.nan)
    return per_query


def evaluate_ranked(
    ids: Int[np.ndarray, "query depth"],
    positives: Positives,
    *,
    ks: Sequence[int] = (1, 5, 10),
    exclude: Positives | None = None,
    map_denominator: MapDenominator = "min(R,k)",
    bootstrap: int | Literal["auto"] = 0,
    seed: int = 0,
) -> dict[str, float]:
    """Metrics of top-k lists as a search index returns them, best first; id -1 (too few results) is a miss.

    `positives` and `exclude` are in the same ids. An excluded id closes up the list, so ask the index for
    as many results more as are excluded. What needs ranks beyond the list is not returned: map,
    r_precision, map@r, medr and mnr; and the mean reciprocal rank counts 0 for a miss, which is why it is
    named mrr@depth.
    """
    lists = as_numpy(ids)
    if lists.ndim != 2 or not np.issubdtype(lists.dtype, np.integer):
        raise InputError(f"ids must be an integer matrix [query, depth], not {lists.dtype} of shape {lists.shape}")
    if lists.size and lists.min() < -1:
        raise InputError(f"id {lists.min()} is negative; only -1, for a missing result, has a meaning")
    ks = _cutoffs(ks)
    n_query, depth = lists.shape
    relevant_ids = _id_lists(positives, n_query, None, "positives")
    removed_ids = _id_lists(exclude, n_query, None, "exclude") if exclude is not None else None
    entries = []
    n_relevant = np.zeros(n_query, dtype=np.int64)
    for query, row in enumerate(lists):
        relevant = relevant_ids[query]
        found = row[row >= 0]
        if np.unique(found).size != found.size:
            raise InputError(f"the result list of query {query} holds an id twice; merge duplicates before evaluating")
        if removed_ids is not None:
            row = row[~np.isin(row, removed_ids[query])]
            relevant = np.setdiff1d(relevant, removed_ids[query])
        if row.size < max(ks) and found.size == depth:
            raise InputError(f"query {query} has {row.size} results for k={max(ks)}; ask the index for a longer list")
        rank = np.full(relevant.size, np.inf)
        hits = np.flatnonzero(np.isin(row, relevant))
        rank[: hits.size] = hits + 1
        n_relevant[query] = relevant.size
        entries.append(rank)
    flat = RankedItems(
        np.repeat(np.arange(n_query), n_relevant),
        np.concatenate([np.zeros(0), *entries]),
        np.ones(int(n_relevant.sum())),
    )
    per_query = binary_metrics(flat, n_query, ks, map_denominator)
    per_query |= ndcg(flat, n_query, ks, "linear")
    per_query["rr@depth"] = per_query["rr"]
    for beyond_the_list in ("ap", "rr", "first_rank", "r_precision", "ap@r"):
        del per_query[beyond_the_list]
    return _averages(per_query, bootstrap, seed)


def image_text_retrieval(
    image_embeddings: Float[np.ndarray, "image dim"],
    text_embeddings: Float[np.ndarray, "text dim"],
    owner: Int[np.ndarray, " text"],
    *,
    ks: Sequence[int] = (1, 5, 10),
    ties: Ties = "index",
    chunk_size: int | None = None,
    bootstrap: int | Literal["auto"] = 0,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Cosine retrieval over a gallery without repeated images: {"text_to_image": ..., "image_to_text": ...}.

    `owner[j]` is the row of the image that text j describes. An image query counts as a hit if any of its
    texts is in the top k. Values as from `evaluate`.
    """
    images, texts = as_rows(image_embeddings, "image_embeddings"), as_rows(text_embeddings, "text_embeddings")
    owners = as_numpy(owner)
    if owners.shape != (len(texts),):
        raise InputError(f"owner must hold one image row per text: shape ({len(texts)},), not {owners.shape}")
    if owners.size and (owners.min() < 0 or owners.max() >= len(images)):
        raise InputError(f"owner names image rows {owners.min()} to {owners.max()}, there are {len(images)} images")
    rows = np.arange(len(images))

    def direction(queries: np.ndarray, gallery: np.ndarray, wanted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        return evaluate(
            queries=queries,
            gallery=gallery,
            positives=positives_from_labels(wanted, labels),
            ks=ks,
            ties=ties,
            chunk_size=chunk_size,
            bootstrap=bootstrap,
            seed=seed,
        )

    return {
        "text_to_image": direction(texts, images, owners, rows),
        "image_to_text": direction(images, texts, rows, owners),
    }


def mean_recall(*directions: Mapping[str, float], ks: Sequence[int] | None = None) -> float:
    """mR: the mean of hit@k over the directions and cut-offs (all of them unless `ks` chooses)."""
    values = _hits(directions, ks)
    return math.fsum(values) / len(values)


def recall_sum(*directions: Mapping[str, float], ks: Sequence[int] | None = None) -> float:
    """rSum: the sum of hit@k over the directions and cut-offs, as fractions (papers print it times 100)."""
    return math.fsum(_hits(directions, ks))


def median_rank(first_rank: Float[np.ndarray, " query"], convention: Literal["plain", "open_clip"] = "plain") -> float:
    """MedR of 1-based best ranks. NaN (skipped queries) is left out.

    "plain" is the median; "open_clip" is floor(median of 0-based ranks) + 1, as open_clip prints it. They
    differ when an even number of queries puts the median between two ranks.
    """
    ranks = as_numpy(first_rank).astype(np.float64)
    ranks = ranks[~np.isnan(ranks)]
    if not ranks.size:
        raise InputError("median_rank needs the rank of at least one query")
    if convention == "open_clip":
        return float(np.floor(np.median(ranks - 1)) + 1)
    if convention != "plain":
        raise InputError(f"convention={convention!r} is neither 'plain' nor 'open_clip'")
    return float(np.median(ranks))


def positives_from_labels(
    query_labels: Shaped[np.ndarray, " query"], gallery_labels: Shaped[np.ndarray, " gallery"]
) -> list[Int[np.ndarray, " item"]]:
    """Per query the gallery rows of the same label: classes, or the image that a caption belongs to."""
    wanted, labels = as_numpy(query_labels), as_numpy(gallery_labels)
    if wanted.ndim != 1 or labels.ndim != 1:
        raise InputError(f"labels must be one per item, not of shapes {wanted.shape} and {labels.shape}")
    order = np.argsort(labels, kind="stable")
    in_order = labels[order]
    start, stop = np.searchsorted(in_order, wanted), np.searchsorted(in_order, wanted, side="right")
    return [order[a:b] for a, b in zip(start, stop, strict=True)]


def positives_from_relevance(relevance: Bool[np.ndarray, "query gallery"]) -> list[Int[np.ndarray, " item"]]:
    """Per query the gallery rows whose entry in a binary relevance matrix is not zero."""
    matrix = as_numpy(relevance)
    if matrix.ndim != 2:
        raise InputError(f"relevance must be a matrix [query, gallery], not of shape {matrix.shape}")
    return [np.flatnonzero(row) for row in matrix]


def exclude_same_item(
    query_ids: Shaped[np.ndarray, " query"], gallery_ids: Shaped[np.ndarray, " gallery"]
) -> list[Int[np.ndarray, " item"]]:
    """Per query the gallery rows with the query's own item id, for `exclude`.

    By id and not by rank: a duplicate or a quantised copy may stand above the query's own row.
    """
    return positives_from_labels(query_ids, gallery_ids)


def _averages(per_query: PerQuery, bootstrap: int | Literal["auto"], seed: int) -> dict[str, float]:
    some_hit = next(values for name, values in per_query.items() if name.startswith("hit@"))
    n_query = int((~np.isnan(some_hit)).sum())
    if n_query == 0:
        raise InputError(f"none of the {some_hit.size} queries has a positive in the gallery; check the labels or ids")
    means = {_mean_name(name): values for name, values in per_query.items() if not name.startswith("tie@")}
    out: dict[str, float] = {name: _mean(values) for name, values in means.items()}
    if "mnr" in means:
        out["medr"] = median_rank(means["mnr"])

    n_resample = (1000 if n_query < BOOTSTRAP_BELOW else 0) if bootstrap == "auto" else bootstrap
    if n_resample:
        out |= _bootstrap_intervals(means, n_resample, seed)
    out |= {"n_query": n_query, "n_skipped": some_hit.size - n_query}
    graded = [values for name, values in means.items() if name.startswith("ndcg@")]
    if graded:
        out["n_ndcg_skipped"] = int(np.isnan(graded[0]).sum())
    for name, values in per_query.items():
        if name.startswith("tie@"):
            out["n_ties_at_" + name.removeprefix("tie@")] = int(np.nansum(values))
    return out


def _mean(values: Float[np.ndarray, " query"]) -> float:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else math.nan


def _mean_name(per_query_name: str) -> str:
    if per_query_name == "first_rank":
        return "mnr"
    head, at, k = per_query_name.partition("@")
    return {"ap": "map", "rr": "mrr"}.get(head, head) + at + k


def _bootstrap_intervals(means: PerQuery, n_resample: int, seed: int) -> dict[str, float]:
    """Percentile intervals (2.5%, 97.5%) of each mean and of the median rank."""
    means = {name: values for name, values in means.items() if not np.isnan(values).all()}
    values = np.stack(list(means.values()), axis=1)
    values = values[~np.isnan(values).all(axis=1)]
    defined = ~np.isnan(values)
    filled = np.where(defined, values, 0.0)
    names = list(means)
    ranks = values[:, names.index("mnr")] if "mnr" in names else None
    rng = np.random.default_rng(seed)
    draws = np.empty((n_resample, len(names) + (ranks is not None)))
    for draw in draws:
        chosen = rng.integers(len(values), size=len(values))
        times = np.bincount(chosen, minlength=len(values))
        n_defined = times @ defined
        draw[: len(names)] = times @ filled / np.where(n_defined > 0, n_defined, np.nan)
        if ranks is not None:
            drawn = ranks[chosen]
            drawn = drawn[~np.isnan(drawn)]
            draw[-1] = np.median(drawn) if drawn.size else np.nan
    low, high = np.nanquantile(draws, [0.025, 0.975], axis=0)
    out = {}
    for column, name in enumerate([*names, "medr"][: draws.shape[1]]):
        out[f"{name}_low"], out[f"{name}_high"] = float(low[column]), float(high[column])
    return out


def _hits(directions: Sequence[Mapping[str, float]], ks: Sequence[int] | None) -> list[float]:
    if not directions:
        raise InputError("give the result of evaluate for at least one direction")
    found = [int(name[4:]) for name in directions[0] if name.startswith("hit@") and name[4:].isdigit()]
    return [direction[f"hit@{k}"] for direction in directions for k in (ks if ks is not None else found)]


def _cutoffs(ks: Sequence[int]) -> list[int]:
    cutoffs = [int(k) for k in ks]
    if not cutoffs or min(cutoffs) < 1:
        raise InputError(f"ks={cutoffs} must name cut-offs of at least 1")
    return cutoffs


def _id_lists(lists: Positives, n_query: int, n_gallery: int | None, name: str) -> list[np.ndarray]:
    """Sorted and distinct ids per query."""
    if len(lists) != n_query:
        raise InputError(f"{name} has {len(lists)} entries for {n_query} queries; give one sequence of ids per query")
    out = []
    for query, given in enumerate(lists):
        ids = as_numpy(given)
        if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
            raise InputError(
                f"{name}[{query}] must be a sequence of integer ids, not {given!r}; "
                "positives_from_labels makes the sequences out of labels"
            )
        if ids.size > 1 and not (np.diff(ids) > 0).all():
            ids = np.unique(ids)
        if ids.size and (ids[0] < 0 or (n_gallery is not None and ids[-1] >= n_gallery)):
            bad = ids[0] if ids[0] < 0 else ids[-1]
            raise InputError(
                f"{name}[{query}] names item {bad}; ids run from 0 to the end of the gallery ({n_gallery})"
            )
        out.append(ids.astype(np.int64, copy=False))
    return out


def _graded_lists(grades: Grades, n_query: int, n_gallery: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Per query the sorted rows with a positive grade, and their grades."""
    if hasattr(grades, "shape"):
        matrix = as_numpy(grades)
        if matrix.shape != (n_query, n_gallery):
            raise InputError(f"grades have shape {matrix.shape}, the scores ({n_query}, {n_gallery})")
        dense = [(np.arange(n_gallery), row.astype(np.float64)) for row in matrix]
    else:
        if len(grades) != n_query:
            raise InputError(f"grades has {len(grades)} entries for {n_query} queries; give one mapping per query")
        dense = [
            (np.array(sorted(row), dtype=np.int64), np.array([row[i] for i in sorted(row)], dtype=np.float64))
            for row in grades
        ]
    for query, (ids, values) in enumerate(dense):
        if not (np.isfinite(values) & (values >= 0)).all():
            raise InputError(f"grades of query {query} must be finite and at least 0")
        if ids.size and (ids[0] < 0 or ids[-1] >= n_gallery):
            raise InputError(f"grades of query {query} name items outside the gallery of {n_gallery}")
    return [(ids[values > 0], values[values > 0]) for ids, values in dense]
