"""Which image files a folder holds: names as bytes, sizes and times, loops and unreadable places reported."""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mmalign.errors import InputError

__all__ = ["DEFAULT_SCANNING", "IMAGE_SUFFIXES", "FoundFile", "ScanResult", "ScanSettings", "parse_shard", "scan"]

# What counts as an image by name. Content decides in the end: these are the files worth opening.
_SUFFIXES = """
    .jpg .jpeg .jpe .jfif .png .apng .webp .gif .bmp .dib .tif .tiff .heic .heif .hif .avif .jp2 .j2k .jpx .ico .icns
    .ppm .pgm .pbm .pnm .pcx .tga .dds .psd .qoi .sgi .mpo .exr
"""
IMAGE_SUFFIXES = frozenset(_SUFFIXES.split())


@dataclass(frozen=True)
class ScanSettings:
    """Which files count; recorded for each indexed folder.

    Attributes:
        follow_links: enter linked folders too, each real folder once. Linked files always count.
        all_files: also files without an image suffix; those that are no images will be reported as skipped.
        hidden: also names that start with a dot (thumbnail caches, macOS resource forks).
        shard: (i, n) keeps the i-th of n parts, counted from 0, by a hash of the path.
    """

    follow_links: bool = False
    all_files: bool = False
    hidden: bool = False
    shard: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.shard is None:
            return
        given = tuple(self.shard) if isinstance(self.shard, (tuple, list)) else ()
        if len(given) != 2 or not all(isinstance(part, int) for part in given) or not 0 <= given[0] < given[1]:
            raise InputError(f"shard is {self.shard!r}; give (i, n) with i from 0 to n-1, for example (0, 4)")
        object.__setattr__(self, "shard", given)  # JSON has lists only

    def to_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return {**asdict(self), "shard": list(self.shard) if self.shard else None}


DEFAULT_SCANNING = ScanSettings()


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file below the root. `path` is relative, with `/`, as the file system has it."""

    path: bytes
    size: int
    mtime_ns: int


@dataclass
class ScanResult:
    """Files in byte order of their paths; what could not be looked at: path, reason, message.

    Whether the files of a closed folder, and closed files, are still there is not known.
    """

    files: list[FoundFile] = field(default_factory=list)
    problems: list[tuple[bytes, str, str]] = field(default_factory=list)
    closed_folders: list[bytes] = field(default_factory=list)
    closed_files: set[bytes] = field(default_factory=set)


def parse_shard(text: str) -> tuple[int, int]:
    """`"0/4"` as (0, 4): the first of four parts.

    Raises:
        InputError: not of that form, or the part is not below the count.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not int(match[1]) < int(match[2]):
        raise InputError(f"shard {text!r} is not of the form I/N with I from 0 to N-1, for example 0/4")
    return int(match[1]), int(match[2])


def scan(root: Path, settings: ScanSettings = DEFAULT_SCANNING, *, skip: Path | None = None) -> ScanResult:
    """Walk a folder.

    Args:
        root: the folder.
        settings: which files count.
        skip: a folder to leave out: the index that is being made. Finished indexes are left out in any case.

    Raises:
        InputError: the root is missing, no folder, or may not be read.
    """
    if not root.exists():
        raise InputError(f"{str(root)!r} does not exist; check the path, and that its disk is mounted")
    if not root.is_dir():
        raise InputError(f"{str(root)!r} is a file; give the folder it is in")
    result = ScanResult()
    inside = skip is not None and root.resolve() in skip.resolve().parents
    skipped = os.fsencode(skip.resolve().relative_to(root.resolve()).as_posix()) + b"/" if skip and inside else None
    shard = settings.shard
    for found in _walk(os.fsencode(root), settings, result):
        if skipped is not None and found.path.startswith(skipped):
            continue
        if shard is None or int.from_bytes(hashlib.sha1(found.path).digest()[:8], "big") % shard[1] == shard[0]:
            result.files.append(found)
    if b"" in result.closed_folders:
        raise InputError(f"folder {str(root)!r} may not be read; change its permissions")
    result.files.sort(key=lambda found: found.path)
    return result


def _walk(root: bytes, settings: ScanSettings, result: ScanResult) -> Iterator[FoundFile]:
    waiting = [b""]
    seen: set[tuple[int, int]] = set()
    while waiting:
        folder = waiting.pop()
        here = os.path.join(root, folder) if folder else root
        try:
            if settings.follow_links:
                about = os.stat(here)
                if (about.st_dev, about.st_ino) in seen:
                    continue
                seen.add((about.st_dev, about.st_ino))
            with os.scandir(here) as listing:
                entries = list(listing)
        except OSError as error:
            result.closed_folders.append(folder)
            result.problems.append((folder, "permission", f"folder cannot be read: {error.strerror}"))
            continue
        if any(entry.name == b"CURRENT" for entry in entries) and any(
            entry.name.startswith(b"manifest-") for entry in entries
        ):
            continue  # an index of ours
        for entry in entries:
            if entry.name.startswith(b".") and not settings.hidden:
                continue
            path = folder + b"/" + entry.name if folder else entry.name
            yield from _look(entry, path, settings, result, waiting)


def _look(
    entry: os.DirEntry[bytes], path: bytes, settings: ScanSettings, result: ScanResult, waiting: list[bytes]
) -> Iterator[FoundFile]:
    try:
        if entry.is_dir(follow_symlinks=False) or (settings.follow_links and entry.is_dir()):
            waiting.append(path)
            return
        suffix = os.path.splitext(entry.name)[1].decode("ascii", "replace").lower()
        if not settings.all_files and suffix not in IMAGE_SUFFIXES:
            return
        if entry.is_symlink() and entry.is_dir():
            return
        about = entry.stat()
    except OSError as error:
        # Broken links, links to themselves, files that vanished since the listing; or no permission, a failing disk.
        gone = error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
        if not gone:
            result.closed_files.add(path)
        reason = "missing" if gone else "permission" if isinstance(error, PermissionError) else "unreadable"
        result.problems.append((path, reason, f"cannot be looked at: {error.strerror}"))
        return
    if entry.is_file():
        yield FoundFile(path, about.st_size, about.st_mtime_ns)
    else:
        result.problems.append((path, "not_a_file", "is not a regular file"))
