"""Images that are the same: equal files, and pictures that an encoder can hardly tell apart."""

from __future__ import annotations

import os
from collections.abc import Hashable, Sequence
from pathlib import Path

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from mmalign.checks import at_least, in_range
from mmalign.progress import progress_bar

from .items import Item
from .snapshot import Snapshot

__all__ = ["find_duplicates", "links_of", "spare_files"]


def find_duplicates(
    snapshot: Snapshot, near: float | None = None, *, neighbours: int = 20, progress: bool = False
) -> list[list[Item]]:
    """Groups of two or more images that are the same, largest first.

    Near-duplicates are the connected components of "cosine of at least `near`", so the ends of a chain may be less
    alike than that. In a group, files that are there and as they were indexed come first, and links after real files.

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
    return [sorted(map(snapshot.items.item, group), key=_last_to_keep) for group in shared]


def links_of(group: Sequence[Item]) -> list[Item | None]:
    """For each of a group, the one before it that is the same file under another name (a link), or `None`."""
    first: dict[Hashable, Item] = {}
    found = []
    for item in group:
        one = first.setdefault(_identity(item.path), item)
        found.append(None if one is item else one)
    return found


def spare_files(group: Sequence[Item]) -> list[Item]:
    """Those whose files can be deleted while the first stays.

    A link to a file is that file, and no copy of it. What changed or vanished since it was indexed is left out too, and
    all are if that happened to the first.
    """
    if not group[0].as_indexed:
        return []
    found = zip(group[1:], links_of(group)[1:], strict=True)
    return [item for item, same in found if same is None and item.as_indexed]


def _last_to_keep(item: Item) -> tuple[bool, bool]:
    return not item.as_indexed, _is_link(item.path)


def _identity(path: Path) -> Hashable:
    """What is equal for all names of one file."""
    try:
        about = path.stat()
    except OSError:
        return os.path.realpath(path)
    return (about.st_dev, about.st_ino) if about.st_ino else os.path.realpath(path)


def _is_link(path: Path) -> bool:
    """Whether the file, or a folder on the way to it, is a symbolic link."""
    return os.path.realpath(path) != os.path.abspath(path)


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
