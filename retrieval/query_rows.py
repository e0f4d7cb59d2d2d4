"""What is searched for, as vectors, and what was found, as rows: between a query in words and its hits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

__all__ = ["Found", "QueryRows"]


@dataclass(frozen=True)
class QueryRows:
    """Queries of one kind, unit rows.

    Attributes:
        kind: what they stand for, "text" or "image"; says which background they are compared with.
        old: by the index's own encoder; `None` where that is not needed.
        new: by the one that is replacing it; `None` where none is, or where only the old vectors are to be asked.
    """

    kind: str
    old: Float[np.ndarray, "q dim"] | None
    new: Float[np.ndarray, "q new_dim"] | None = None


@dataclass(frozen=True)
class Found:
    """Results of each query, the best first; row -1 pads short ones.

    Attributes:
        scores: cosines. While an encoder is being replaced, those of old and new vectors are no common scale.
        rows: vector rows, as the item table names them.
        matches: how far above chance; `None` where that is not known.
        by_new: which were found by their new vector; `None` where there are none.
    """

    scores: Float[np.ndarray, "q k"]
    rows: Int[np.ndarray, "q k"]
    matches: Float[np.ndarray, "q k"] | None = None
    by_new: Bool[np.ndarray, "q k"] | None = None
