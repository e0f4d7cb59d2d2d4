"""Is anything here like the query? Cosines differ between encoders, queries and collections; a match score does not.

A hit's match is the share of reference queries for which an index of this size would be expected to reach a lower best
cosine by chance alone. Reference queries are everyday phrases for text (`query_bank.txt`) and stored images for images.
For each, the distribution of cosines over a background sample of the index is taken to be normal above its median,
with the scale read between the median and the 98th percentile, so that up to 2 % true matches do not disturb it; the
expected best of n is its quantile at 1 - 1/(n+1).
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from statistics import NormalDist
from typing import Any

import numpy as np
from jaxtyping import Float

from .faiss_index import EXACT_ROWS
from .vectors import Vectors

__all__ = ["BACKGROUND_ROWS", "Calibration", "background_rows", "best_by_chance", "query_bank"]

BACKGROUND_ROWS = 2048
_UPPER = 0.98


def query_bank(rows: int) -> list[str]:
    """Everyday search phrases for an index of so many rows; also used to tune and measure it with text queries.

    All 199 where an approximate index has to be tuned, every third below: a large text tower needs a tenth of a second
    for each on a CPU, and a small index should not wait for that.
    """
    phrases = files("retrieval").joinpath("query_bank.txt").read_text(encoding="utf-8").splitlines()
    return phrases if rows > EXACT_ROWS else phrases[::3]


def background_rows(alive: np.ndarray) -> np.ndarray:
    """Up to 2,048 rows spread evenly over those in use."""
    rows = np.flatnonzero(alive)
    return rows[np.linspace(0, len(rows) - 1, min(len(rows), BACKGROUND_ROWS)).astype(np.int64)]


def best_by_chance(
    queries: Float[np.ndarray, "q dim"],
    background: Float[np.ndarray, "b dim"],
    n: int,
    *,
    leave_one_out: bool = False,
) -> Float[np.ndarray, " q"]:
    """Best cosine each query would be expected to reach among `n` unrelated items, in ascending order.

    Args:
        queries: unit rows.
        background: unit rows of the collection.
        n: size of the collection.
        leave_one_out: the queries are the background rows themselves.
    """
    scores = queries @ background.T
    if leave_one_out:
        scores = scores[~np.eye(len(scores), dtype=bool)].reshape(len(scores), -1)
    middle, upper = np.quantile(scores, [0.5, _UPPER], axis=1)
    reach = NormalDist().inv_cdf(1 - 1 / (n + 1)) / NormalDist().inv_cdf(_UPPER)
    return np.sort(middle + (upper - middle) * reach).astype(np.float32)


@dataclass(frozen=True)
class Calibration:
    """Sorted chance levels for text and for image queries; empty where the encoder lacks the modality."""

    text: Float[np.ndarray, " references"]
    image: Float[np.ndarray, " references"]

    @classmethod
    def measure(
        cls, vectors: Vectors, alive: np.ndarray, text_queries: np.ndarray | None, *, size: int | None = None
    ) -> Calibration | None:
        """Take the levels from an index; `None` for fewer than 8 items, which say nothing about chance.

        Args:
            vectors: all rows.
            alive: which of them are in use.
            text_queries: reference queries, where the encoder takes text.
            size: of the collection that these rows are a part of; as many as they are by default.
        """
        rows = background_rows(alive)
        if len(rows) < 8:
            return None
        background = vectors.gather(rows)
        n = size or int(alive.sum())
        text = best_by_chance(text_queries, background, n) if text_queries is not None else np.zeros(0, np.float32)
        return cls(text, best_by_chance(background, background, n, leave_one_out=True))

    def match(self, scores: np.ndarray, kind: str) -> Float[np.ndarray, ...] | None:
        """Match in [0, 1] for cosines of queries of a kind ("text" or "image"); `None` where no level is known."""
        levels = self.text if kind == "text" else self.image
        if not len(levels):
            return None
        return np.searchsorted(levels, scores, side="left") / len(levels)

    def to_dict(self) -> dict[str, Any]:
        """For the manifest: at most 256 levels each, which keeps steps under half a percent."""
        return {name: _thinned(getattr(self, name)) for name in ("text", "image")}

    @classmethod
    def from_dict(cls, stored: dict[str, Any] | None) -> Calibration | None:
        """From the manifest."""
        if stored is None:
            return None
        return cls(*(np.array(stored[name], np.float32) for name in ("text", "image")))


def _thinned(levels: np.ndarray) -> list[float]:
    if len(levels) > 256:
        levels = np.quantile(levels, np.linspace(0, 1, 256))
    return [round(float(level), 6) for level in levels]
