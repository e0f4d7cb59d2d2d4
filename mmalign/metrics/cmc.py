"""CMC curve and mAP among items of the same classes, each query's own item left out.

The evaluation of compatible representations: queries by the new model, gallery by the old one, the same
items in the same order, compared on the dimensions both have. Methods card "retrieval metrics", sections 1
and 3.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Shaped

from mmalign.errors import InputError

from ._arrays import as_numpy, as_rows, unit_rows
from .retrieval import exclude_same_item, per_query_metrics, positives_from_labels


class CMCResult(NamedTuple):
    """CMC@1..topk, mAP, and how many queries had another item of their class."""

    cmc: Float[np.ndarray, " topk"]
    map: float
    n_valid: int


def cmc_map_self_excluded(
    query: Float[np.ndarray, "item dim_query"],
    gallery: Float[np.ndarray, "item dim_gallery"],
    labels: Shaped[np.ndarray, " item"],
    *,
    topk: int = 5,
    chunk_size: int | None = None,
) -> CMCResult:
    """CMC and mAP of row i of `query` against every row of `gallery` but i. Classes of one are skipped."""
    queries, references = _same_dimensions(query, gallery)
    if len(queries) != len(references):
        raise InputError(f"query has {len(queries)} rows, gallery {len(references)}; both must hold the same items")
    classes, items = as_numpy(labels), np.arange(len(queries))
    values = per_query_metrics(
        queries=queries,
        gallery=references,
        positives=positives_from_labels(classes, classes),
        exclude=exclude_same_item(items, items),
        ks=(topk,),
        chunk_size=chunk_size,
    )
    valid = ~np.isnan(values["ap"])
    return CMCResult(cmc_curve(values["first_rank"], topk), float(values["ap"][valid].mean()), int(valid.sum()))


def cmc_curve(first_rank: Float[np.ndarray, " query"], topk: int) -> Float[np.ndarray, " topk"]:
    """CMC@k for k = 1..topk: the share of queries whose best rank is at most k. NaN (skipped) is left out."""
    ranks = as_numpy(first_rank)
    ranks = ranks[~np.isnan(ranks)]
    if not ranks.size:
        raise InputError("no query has another item of its class; CMC and mAP are undefined")
    return (ranks[:, None] <= np.arange(1, topk + 1)).mean(axis=0)


def truncated_cosine(
    query: Float[np.ndarray, "query dim_query"], gallery: Float[np.ndarray, "gallery dim_gallery"]
) -> Float[np.ndarray, "query gallery"]:
    """Cosine similarity after cutting both sides to the smaller dimension."""
    queries, references = _same_dimensions(query, gallery)
    return unit_rows(queries, "query") @ unit_rows(references, "gallery").T


def _same_dimensions(
    query: Float[np.ndarray, "query dim_query"], gallery: Float[np.ndarray, "gallery dim_gallery"]
) -> tuple[Float[np.ndarray, "query dim"], Float[np.ndarray, "gallery dim"]]:
    queries, references = as_rows(query, "query"), as_rows(gallery, "gallery")
    dim = min(queries.shape[1], references.shape[1])
    return queries[:, :dim], references[:, :dim]
