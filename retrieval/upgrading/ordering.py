"""In which order the images of an index are embedded anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from jaxtyping import Float, Int

from mmalign.errors import InputError
from mmalign.partial_backfill import backfill_order
from mmalign.progress import progress_bar

from ..snapshot import Snapshot

__all__ = ["Order", "backfill_rows"]

Order: TypeAlias = str | Callable[[Float[np.ndarray, "n dim"]], Float[np.ndarray, " n"]]

MOST_FOR_DENSITY = 100_000
_NEIGHBOURS = 10


def backfill_rows(
    snapshot: Snapshot, order: Order, *, seed: int = 0, progress: bool = False
) -> Int[np.ndarray, " alive"]:
    """All rows in use, first what is to be embedded first; see `IndexUpgrade.start`.

    Raises:
        InputError: another order, or a column that is not there, has no value for an image, or holds no numbers.
    """
    rows = np.flatnonzero(snapshot.alive)
    if order == "auto":
        order = "density" if len(rows) <= MOST_FOR_DENSITY else "random"
    if callable(order):
        return rows[backfill_order(order, snapshot.vectors.gather(rows))]
    how, _, column = order.partition(":")
    if how in ("class-mean", "access") and not column:
        raise InputError(f"order {order!r} names no column; give {how}:COLUMN, a column of your metadata")
    if how == "random" or (how == "density" and len(rows) <= _NEIGHBOURS):
        return rows[backfill_order("random", np.zeros((len(rows), 1)), seed=seed)]
    if how == "density":
        return rows[backfill_order("density", np.zeros((len(rows), 1)), density=_density(snapshot, rows, progress))]
    if how == "class-mean":
        labels = np.array([str(value) for value in _column(snapshot, column, rows)])
        return rows[backfill_order("class_mean", snapshot.vectors.gather(rows), labels=labels)]
    if how == "access":
        values = _column(snapshot, column, rows)
        if not all(isinstance(value, (int, float)) for value in values):
            raise InputError(f"column {column!r} holds no numbers; give one that counts how often an image is used")
        return rows[backfill_order("access", np.zeros((len(rows), 1)), counts=np.array(values, np.float64))]
    raise InputError(
        f"order is {order!r}; give auto, density, random, class-mean:COLUMN or access:COLUMN (in Python, a callable)"
    )


def _density(snapshot: Snapshot, rows: Int[np.ndarray, " n"], progress: bool) -> Float[np.ndarray, " n"]:
    """Mean cosine to the nearest others, as the index finds them."""
    found = np.empty(len(rows))
    with progress_bar("ordering", len(rows), enabled=progress) as advance:
        for start in range(0, len(rows), 1024):
            part = rows[start : start + 1024]
            scores, near = snapshot.search_vectors(snapshot.vectors.gather(part), _NEIGHBOURS + 1)
            others = np.where((near == part[:, None]) | (near < 0), -1.0, scores)  # its own, and padding, come last
            found[start : start + len(part)] = -np.sort(-others, axis=1)[:, :_NEIGHBOURS].mean(axis=1)
            advance(len(part))
    return found


def _column(snapshot: Snapshot, name: str, rows: Int[np.ndarray, " n"]) -> list[object]:
    """The user's value for each row: that of the first file of its content."""
    table = snapshot.metadata
    if table is None or name not in table.column_names or name == "id":
        known = [column for column in table.column_names if column != "id"] if table is not None else []
        raise InputError(
            f"there is no metadata column {name!r}; " + (f"there are {', '.join(known)}" if known else "there is none")
        )
    values = dict(zip(table.column("id").to_pylist(), table.column(name).to_pylist(), strict=True))
    ids = snapshot.items.numbers("id")
    found = [values.get(int(ids[snapshot.items.positions_of_row(int(row))[0]])) for row in rows]
    missing = sum(value is None for value in found)
    if missing:
        raise InputError(f"{missing:,} of {len(found):,} images have no value in column {name!r}; fill them in")
    return found
