"""Results that can be looked at: a picture with a row of hits for each query."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from mmalign.errors import InputError
from mmalign.imaging.contact_sheet import draw_contact_sheet

from .hits import Hit

__all__ = ["draw_grid"]


def draw_grid(
    results: Sequence[tuple[str, Sequence[Hit]]], path: str | os.PathLike[str], *, columns: int | None = None
) -> Path:
    """Draw hits under the query that found them and save the picture.

    Args:
        results: (query, hits) pairs; a query takes as many lines as its hits need.
        path: where to; the suffix says the format.
        columns: hits a line; by default the most hits of any query, at most 8.

    Raises:
        InputError: nothing to draw, or the file cannot be written.
    """
    if not results:
        raise InputError("there are no results to draw")
    rows = [(query, [(hit.path, _caption(hit)) for hit in hits]) for query, hits in results]
    return draw_contact_sheet(rows, path, columns=columns, empty="nothing here matches")


def _caption(hit: Hit) -> tuple[str, str]:
    match = "" if hit.match is None else f"  match {hit.match:.2f}"
    return f"{hit.rank}  cosine {hit.score:.3f}{match}", hit.item.name
