"""Images that are the same: equal files, and pictures that an encoder can hardly tell apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from mmalign.errors import InputError

from .items import Item

if TYPE_CHECKING:
    from .index import ImageIndex

__all__ = ["find_duplicates"]


def find_duplicates(index: ImageIndex, threshold: float | None = None, *, neighbours: int = 20) -> list[list[Item]]:
    """Groups of two or more images that are the same, largest first.

    Near-duplicates are the connected components of "cosine of at least `threshold`", so the ends of a chain may be less
    alike than that.

    Args:
        index: where to look.
        threshold: cosine from which two different files count as near-duplicates; `None` gives files of equal content
            only, which is certain.
        neighbours: how many nearest images of each are looked at.

    Raises:
        InputError: the threshold is no cosine.
    """
    total = len(index.vectors)
    owner = np.arange(total)
    if threshold is not None:
        if not -1 <= threshold <= 1:
            raise InputError(f"threshold {threshold} is no cosine; give a number between -1 and 1, such as 0.98")
        rows = np.flatnonzero(index.snapshot.alive)
        starts, ends = [], []
        for part in np.array_split(rows, max(1, len(rows) // 1024)):
            scores, found = index.search_vectors(index.vectors.gather(part), min(neighbours + 1, max(1, len(rows))))
            close = (scores >= threshold) & (found >= 0)
            starts.append(np.repeat(part, close.sum(axis=1)))
            ends.append(found[close])
        start, end = np.concatenate(starts), np.concatenate(ends)
        graph = coo_array((np.ones(len(start), bool), (start, end)), shape=(total, total))
        _, owner = connected_components(graph, directed=False)
    groups: dict[int, list[int]] = {}
    for position, row in enumerate(index.items.numbers("row")):
        groups.setdefault(int(owner[row]), []).append(position)
    shared = sorted((group for group in groups.values() if len(group) > 1), key=len, reverse=True)
    return [[index.items.item(position) for position in group] for group in shared]
