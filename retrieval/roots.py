"""The indexed folders: how the manifest remembers them, where they are now, and what a path is called below them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from mmalign.errors import InputError

__all__ = ["names_of", "place_of_root", "resolve_roots", "store_roots"]


def store_roots(roots: Sequence[Path], folder: Path) -> list[dict[str, str]]:
    """Roots as they go into the manifest: absolute, and relative to the index so that both can move together."""
    stored = []
    for root in roots:
        try:
            relative = os.path.relpath(root.resolve(), folder.resolve())
        except ValueError:  # another drive on Windows
            relative = ""
        inside = root.resolve() in folder.resolve().parents
        below = os.path.relpath(folder.resolve(), root.resolve()) if inside else ""
        stored.append({"absolute": os.fspath(root.resolve()), "relative": relative, "index_below": below})
    return stored


def resolve_roots(stored: Sequence[dict[str, str]], folder: Path) -> list[Path]:
    """Where the indexed folders are now.

    The recorded place if it still exists, else beside the moved index; but an index inside an indexed folder belongs
    to the folder it is in, or a copy of both would answer with the original's files.
    """
    found = []
    for root in stored:
        absolute = Path(root["absolute"])
        beside = Path(os.path.normpath(folder.resolve() / root["relative"])) if root["relative"] else absolute
        below = root.get("index_below", "")
        inside = bool(below) and beside / below == folder.resolve()
        found.append(beside if beside.exists() and (inside or not absolute.exists()) else absolute)
    return found


def place_of_root(root: Path, roots: Sequence[Path]) -> int:
    """Number of an indexed folder, or the next free one for a new folder.

    Raises:
        InputError: it lies inside an indexed folder, or holds one.
    """
    wanted = root.resolve()
    for number, path in enumerate(roots):
        known = path.resolve()
        if known == wanted:
            return number
        if known in wanted.parents or wanted in known.parents:
            raise InputError(f"{str(root)!r} and the indexed {str(path)!r} overlap; index the outer one")
    return len(roots)


def names_of(path: str | os.PathLike[str], roots: Sequence[Path]) -> list[tuple[int, bytes]]:
    """What a file may be called in the item table: (number of a root, raw name below it), likeliest first.

    The last is (-1, absolute path), the name of files that were added by themselves.
    """
    whole = Path(os.path.abspath(path))
    wanted = whole.parent.resolve() / whole.name  # a linked file is indexed under its own name
    names = []
    for number, root in enumerate(roots):
        if root.resolve() in wanted.parents:
            names.append((number, os.fsencode(wanted.relative_to(root.resolve()).as_posix())))
    return [*names, (-1, os.fsencode(whole.as_posix()))]
