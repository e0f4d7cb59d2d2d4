"""Images that are the same: equal files, and pictures that an encoder can hardly tell apart."""

from __future__ import annotations

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from mmalign.checks import at_least, in_range
from mmalign.progress import progress_bar

from .items import Item
from .snapshot import Snapshot

__all__ = ["find_duplicates"]


def find_duplicates(
    snapshot: Snapshot, near: float | None = None, *, neighbours: int = 20, progress: bool = False
) -> list[list[Item]]:
    """Groups of two or more images that are the same, largest first.

    Near-duplicates are the connected components of "cosine of at least `near`", so the ends of a chain may be less
    alike than that.

    Args:
        snapshot: where to look.
        near: cosine from which two different files count as near-duplicates, in [-1, 1], such as 0.98; `None` gives
            files of equal content only, which is certain.
        neighbours: how many nearest images of each are looked at.
        progress: show a bar.

    Raises:
        InputError: `near` is no cosine, or `neighbours` is below 1.
    """
    in_range("near", near, -1, 1)
    at_least("neighbours", neighbours)
    owner = np.arange(len(snapshot.vectors))
    if near is not None and snapshot.alive_count:
        owner = _components(snapshot, near, neighbours, progress)
    groups: dict[int, list[int]] = {}
    for position, row in enumerate(snapshot.items.numbers("row")):
        groups.setdefault(int(owner[row]), []).append(position)
    shared = sorted((group for group in groups.values() if len(group) > 1), key=len, reverse=True)
    return [[snapshot.items.item(position) for position in group] for group in shared]


def _components(snapshot: Snapshot, near: float, neighbours: int, progress: bool) -> np.ndarray:
    """Number of its group for every vector row."""
    rows = np.flatnonzero(snapshot.alive)
    starts, ends = [], []
    with progress_bar("comparing", len(rows), enabled=progress) as advance:
        for part in np.array_split(rows, max(1, len(rows) // 1024)):
            scores, found = snapshot.search_vectors(snapshot.vectors.gather(part), min(neighbours + 1, len(rows)))
            close = (scores >= near) & (found >= 0)
            starts.append(np.repeat(part, close.sum(axis=1)))
            ends.append(found[close])
            advance(len(part))
    start, end = np.concatenate(starts), np.concatenate(ends)
    total = len(snapshot.vectors)
    graph = coo_array((np.ones(len(start), bool), (start, end)), shape=(total, total))
    groups: np.ndarray = connected_components(graph, directed=False)[1]
    return groups
