"""What is wrong with an index folder, and what can be mended without the images."""

from __future__ import annotations

import os
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmalign.errors import IndexDamagedError

from .draft import Draft
from .finishing import finish
from .remedies import index_commands
from .snapshot import Snapshot
from .storage import Manifest, Store, find_index, verify_command
from .upgrading.part import files_beside

__all__ = ["Problem", "diagnose", "repair"]


@dataclass(frozen=True)
class Problem:
    """A file of an index, what is wrong with it, and what to do."""

    file: str
    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.file} {self.problem}; {self.remedy}"

    def to_dict(self) -> dict[str, str]:
        """JSON-safe."""
        return asdict(self)


def diagnose(folder: str | os.PathLike[str], *, contents: bool = True, progress: bool = False) -> list[Problem]:
    """Every problem of an index, each with its remedy; empty if all checksums and counts hold.

    Args:
        folder: the index, or a folder that holds one.
        contents: compare every file with its checksum; without it, only what files say of each other, which is enough
            after `repair`.
        progress: show a bar.

    Raises:
        InputError: no index there.
        IndexDamagedError: the manifest itself is unreadable or of a newer format.
    """
    path = find_index(folder)
    store = Store(path)
    while True:
        manifest = store.read_unchecked()
        checked = store.check_contents(manifest, progress=progress) if contents else ()
        problems = [(name, text) for name, text in checked if text] or list(Snapshot(store).inconsistencies())
        if not problems or not store.is_superseded(manifest):  # else a writer cleared what we were checking
            return [Problem(name, text, _remedy(name, path, manifest)) for name, text in problems]


def repair(folder: str | os.PathLike[str], *, progress: bool = False) -> list[str]:
    """Rebuild what can be derived: the FAISS file, calibration, the skip report. Returns what was done.

    Nothing is encoded: reference queries that are lost come back with the next update or `ImageIndex.rebuild`.

    Raises:
        IndexDamagedError: vectors, items or metadata are damaged, which only a backup or the images can restore.
    """
    path = find_index(folder)
    store = Store(path)
    done = []
    with store.write() as writer:
        manifest = store.read_unchecked()
        broken = [name for name, _ in writer.damaged(manifest, manifest["files"], progress=progress)]
        lost = [name for name in broken if name not in _derived(manifest)]
        if lost:
            remedies = list(dict.fromkeys(_remedy(name, path, manifest) for name in lost))
            raise IndexDamagedError(f"{', '.join(lost)} cannot be rebuilt from the rest; {'; '.join(remedies)}")
        if manifest["skipped"] in broken:
            manifest["skipped"] = None
            done.append("dropped the damaged list of skipped files")
        for about in _partitions(manifest):
            if about["queries"] and about["queries"]["file"] in broken:
                about["queries"] = None
                done.append("dropped the damaged reference queries")
        finish(Draft(writer, manifest), force=True, progress=progress)
        done.append("rebuilt the FAISS index and the calibration from the stored vectors")
    return done


def _partitions(manifest: Manifest) -> list[dict[str, Any]]:
    """The manifest, and its entry `upgrade` if there is one."""
    return [manifest, *([manifest["upgrade"]] if manifest.get("upgrade") else [])]


def _derived(manifest: Manifest) -> set[str | None]:
    """Files that can be made again from the others, or done without."""
    parts = _partitions(manifest)
    files = [about[kind]["file"] for about in parts for kind in ("queries", "faiss") if about[kind]]
    files += [about["rest"]["faiss"]["file"] for about in parts if about.get("rest")]
    return {manifest["skipped"], *files}


def _of_upgrade(manifest: Manifest) -> set[str | None]:
    """Files without which the index is as it was before its upgrade began."""
    about = manifest.get("upgrade")
    if not about:
        return set()
    return {*files_beside(about), *(segment["file"] for segment in about["segments"])}


def _remedy(name: str, folder: Path, manifest: Manifest) -> str:
    if name in _derived(manifest):
        return f"{verify_command(folder, repair=True)} makes it again or does without"
    if name in _of_upgrade(manifest):
        command = f"`mmalign upgrade {shlex.quote(os.fspath(folder))} --roll-back`"
        return f"{command} gives the index back as it was before the upgrade, which can then be begun again"
    return f"restore the file from a backup, or {_again(manifest, folder)}"


def _again(manifest: Manifest, folder: Path) -> str:
    return f"delete {str(folder)!r} and run {index_commands(manifest, folder)}"
