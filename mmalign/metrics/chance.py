"""What a random order would give: the line every retrieval figure is to be read against."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from scipy.special import gammaln

__all__ = ["chance_hit", "chance_retrieval"]


def chance_retrieval(
    owner: Int[np.ndarray, " text"], n_image: int, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, dict[str, float]]:
    """hit@k and median rank of `image_text_retrieval` where the ranking is a random order.

    An image with r of the m texts is hit within k by chance with 1 - C(m - r, k) / C(m, k); the median rank is the
    smallest at which half of the queries are hit.
    """
    of_image = np.bincount(owner, minlength=n_image)
    of_image = of_image[of_image > 0]
    directions = {"text_to_image": (np.ones(1, np.int64), n_image), "image_to_text": (of_image, len(owner))}
    out = {}
    for name, (relevant, gallery) in directions.items():
        out[name] = {f"hit@{k}": chance_hit(relevant, gallery, k) for k in ks}
        low, high = 1, gallery
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if chance_hit(relevant, gallery, middle) >= 0.5 else (middle + 1, high)
        out[name]["medr"] = float(low)
    return out


def chance_hit(relevant: Int[np.ndarray, " query"], gallery: int, k: int) -> float:
    """Mean over queries of the chance that one of `relevant` items is among k drawn from `gallery` items."""
    if k >= gallery:
        return 1.0
    others: Float[np.ndarray, " query"] = gallery - relevant.astype(np.float64)
    log_miss = gammaln(others + 1) - gammaln(np.maximum(others - k, 0) + 1) - gammaln(gallery + 1)
    log_miss += gammaln(gallery - k + 1)
    return float(np.mean(np.where(others < k, 1.0, -np.expm1(log_miss))))
