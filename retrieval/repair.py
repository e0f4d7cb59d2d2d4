"""What is wrong with an index folder, and what can be mended without the images."""

from __future__ import annotations

import os
from pathlib import Path

from mmalign.errors import IndexDamagedError

from .draft import Draft
from .index import ImageIndex, find_index
from .storage import Manifest, Store

__all__ = ["diagnose", "repair"]


def diagnose(folder: str | os.PathLike[str]) -> list[str]:
    """Every problem of an index, each with its remedy; empty if all checksums and counts hold.

    Raises:
        InputError: no index there.
        IndexDamagedError: the manifest itself is unreadable or of a newer format.
    """
    path = find_index(folder)
    store = Store(path)
    while True:
        manifest = store.read_unchecked()
        problems = list(store.check_contents(manifest)) or ImageIndex(path).verify()
        if not problems or not store.is_superseded(manifest):  # else a writer cleared what we were checking
            return [f"{problem}; {_remedy(problem, path, manifest)}" for problem in problems]


def repair(folder: str | os.PathLike[str]) -> list[str]:
    """Rebuild what can be derived: the FAISS file, calibration, the skip report. Returns what was done.

    Raises:
        IndexDamagedError: vectors, items or metadata are damaged, which only a backup or the images can restore.
    """
    path = find_index(folder)
    store = Store(path)
    done = []
    with store.write() as writer:
        manifest = store.read_unchecked()
        broken = [problem.split(" ")[0] for problem in store.check_contents(manifest)]
        lost = [name for name in broken if name not in _derived(manifest)]
        if lost:
            raise IndexDamagedError(
                f"{', '.join(lost)} cannot be rebuilt from the rest; restore the file from a backup, or "
                f"{_again(manifest, path)}"
            )
        for part in ("skipped", "queries"):
            if manifest[part] in broken:
                manifest[part] = None
                done.append(f"dropped the damaged list of {part}")
        draft = Draft(writer, manifest)
        draft.finish(None, force=True)
        done.append("rebuilt the FAISS index and the calibration from the stored vectors")
    return done


def _derived(manifest: Manifest) -> set[str | None]:
    """Files that can be made again from the others, or done without."""
    return {manifest["skipped"], manifest["queries"], manifest["faiss"]["file"] if manifest["faiss"] else None}


def _remedy(problem: str, folder: Path, manifest: Manifest) -> str:
    if problem.split(" ")[0] in _derived(manifest):
        return f"`mmalign verify {folder} --repair` makes it again or does without"
    return f"restore the file from a backup, or {_again(manifest, folder)}"


def _again(manifest: Manifest, folder: Path) -> str:
    roots = " ".join(root["absolute"] for root in manifest["roots"]) or "FOLDER"
    return f"delete {folder} and run `mmalign index {roots} --out {folder}`"
