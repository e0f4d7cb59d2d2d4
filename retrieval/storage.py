"""The index folder: immutable files, a manifest that names them, one pointer that is replaced last.

    INDEX/
      CURRENT                   name of the manifest in force
      manifest-000007.json      what belongs together: encoder, rows, FAISS settings, size and SHA-256 of every file
      vectors-000003-0.npy      float32 rows, unit norm: the truth; one or more segments
      queries-000003-3.npy      float32 rows of reference text queries, for tuning and calibration
      items-000007-0.arrow      one line an image file: path, size, time, content hash, vector row
      metadata-000005-0.arrow   the user's own columns, by item id
      faiss-000005-0.index      a cache over the first rows, rebuilt from the vectors at will
      skipped-000007-0.jsonl    files that could not be read, with the reason
      LOCK, writer.json         held while somebody writes

While its encoder is being replaced, further vectors-*, queries-* and faiss-* of the new encoder, and
      rows-000009-0.npy         row numbers: what a new row stands for, and what is to be embedded next
      bridge-000009-0.safetensors   maps from the new encoder's space to the old one's, and the support set
      left_out-000009-0.jsonl   images that could not be embedded again, with the reason
      archive-000012/           (after it, if wanted) the index as it was: an index folder of its own

A file is written under its final name by exactly one generation and never changed. A new generation names old and new
files; readers see it when CURRENT has been replaced, and a writer that dies leaves CURRENT as it was.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import hashlib
import json
import os
import re
import shlex
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import filelock

from mmalign.errors import IndexDamagedError, IndexLockedError, InputError, MMAlignError, reason_of
from mmalign.files import sha256_of
from mmalign.progress import progress_bar
from mmalign.provenance import libraries, written_now

from .faiss_module import FAISS_DISTRIBUTIONS

__all__ = [
    "DEFAULT_FOLDER",
    "FORMAT_VERSION",
    "KINDS",
    "UPGRADE_KINDS",
    "Manifest",
    "Store",
    "Writer",
    "find_index",
    "find_index_above",
    "verify_command",
]

FORMAT_VERSION = 1
DEFAULT_FOLDER = ".mmalign"
# What an index is made of, and the suffix of each kind.
KINDS = (
    ("vectors", "npy"),
    ("queries", "npy"),
    ("items", "arrow"),
    ("metadata", "arrow"),
    ("faiss", "index"),
    ("skipped", "jsonl"),
)
# Further ones while its encoder is being replaced, see `retrieval.upgrading`.
UPGRADE_KINDS = (("rows", "npy"), ("bridge", "safetensors"), ("left_out", "jsonl"))
_SUFFIXES = dict(KINDS + UPGRADE_KINDS)
# Exactly our own file names: an index folder may be one in which somebody keeps other things.
_OURS = re.compile(
    r"(?:\.tmp-)?(?:manifest-(?P<manifest>\d{6})\.json|(?:"
    + "|".join(rf"{kind}-(?P<{kind}>\d{{6}})-\d+\.{suffix}" for kind, suffix in _SUFFIXES.items())
    + r"))|(?:\.tmp-)?CURRENT|LOCK|writer\.json"
)

Manifest = dict[str, Any]


@dataclass(frozen=True)
class Store:
    """Reads an index folder; `write` gives the one writer."""

    folder: Path

    def exists(self) -> bool:
        """Whether the folder holds an index."""
        return (self.folder / "CURRENT").is_file()

    def read_manifest(self) -> Manifest:
        """The manifest in force, its files checked by presence and size.

        Raises:
            InputError: no index here.
            IndexDamagedError: a file is missing or has another size, or the format is newer.
        """
        while True:
            manifest = self.read_unchecked()
            problem = next(self._check_sizes(manifest), None)
            if problem is None:
                return manifest
            # A writer may have moved on and cleared old files between our two reads.
            if not self.is_superseded(manifest):
                raise IndexDamagedError(f"index {str(self.folder)!r} is damaged: {problem}; {_repair(self.folder)}")

    def read_unchecked(self) -> Manifest:
        """The manifest in force, whatever became of its files; for finding out what is wrong."""
        while True:
            name = self._current()
            try:
                return self._parse(name)
            except IndexDamagedError:
                if self._current() == name:
                    raise

    def is_superseded(self, manifest: Manifest) -> bool:
        """Whether another generation is in force by now."""
        return bool(self.read_unchecked()["generation"] != manifest["generation"])

    def check_contents(
        self, manifest: Manifest, names: Iterable[str] | None = None, *, progress: bool = False
    ) -> Iterator[tuple[str, str | None]]:
        """Yield every file, or every named one, with what is wrong with its size or SHA-256, or `None`."""
        wanted = {name: manifest["files"][name] for name in (manifest["files"] if names is None else names)}
        megabytes = {name: max(1, about["size"] >> 20) for name, about in wanted.items()}
        with progress_bar("checking", sum(megabytes.values()), unit="MiB", enabled=progress) as advance:
            for name, about in wanted.items():
                yield name, self._check_content(name, about)
                advance(megabytes[name])

    def require_unaltered(self, manifest: Manifest, names: Iterable[str | None]) -> None:
        """Before tables are mapped: their readers trust what lies in them, and a flipped bit can end the process.

        A file is hashed once in a process, as long as it stays the same.

        Raises:
            IndexDamagedError: it is missing, or not what was written.
        """
        for name in filter(None, names):
            try:
                about = (self.folder / name).stat()
                key = (os.fspath(self.folder / name), about.st_ino, about.st_size, about.st_mtime_ns)
            except OSError:
                key = None
            if key is None or key not in _UNALTERED:
                problem = self._check_content(name, manifest["files"][name])
                if problem:
                    raise IndexDamagedError(
                        f"index {str(self.folder)!r} is damaged: {name} {problem}; {_repair(self.folder)}"
                    )
                if key is not None:
                    _UNALTERED.add(key)

    def _check_content(self, name: str, about: dict[str, Any]) -> str | None:
        problem = self._check_size(name, about)
        try:
            if problem is None and sha256_of(self.folder / name) != about["sha256"]:
                problem = "was altered (its SHA-256 is not the recorded one)"
        except OSError as error:
            problem = f"cannot be read ({reason_of(error)})"
        return problem

    def _current(self) -> str:
        try:
            name = (self.folder / "CURRENT").read_text(encoding="ascii").strip()
        except FileNotFoundError:
            if Store(self.folder / DEFAULT_FOLDER).exists():
                raise InputError(
                    f"{str(self.folder)!r} is an indexed folder, not the index itself; "
                    "ImageIndex.open(folder) finds the index in it"
                ) from None
            raise InputError(
                f"{str(self.folder)!r} is not an index; make one with "
                f"`mmalign index FOLDER --out {shlex.quote(os.fspath(self.folder))}`"
            ) from None
        except NotADirectoryError:
            raise InputError(f"{str(self.folder)!r} is a file, not an index folder") from None
        except UnicodeDecodeError:
            name = ""
        except OSError as error:
            raise InputError(f"index {str(self.folder)!r} cannot be read: {error.strerror}") from None
        if not (name.startswith("manifest-") and name.endswith(".json") and "/" not in name):
            raise IndexDamagedError(
                f"{str(self.folder / 'CURRENT')!r} does not name a manifest ({name[:40]!r}); write the name of the "
                "newest manifest-*.json into it, or delete the index and make it again"
            )
        return name

    def _parse(self, name: str) -> Manifest:
        path = self.folder / name
        try:
            sealed = json.loads(path.read_text(encoding="utf-8"))
            manifest, seal = sealed["manifest"], sealed["sha256"]
            newer = manifest["format"] > FORMAT_VERSION
            altered = _seal(manifest) != seal
        except FileNotFoundError:
            raise IndexDamagedError(f"index {str(self.folder)!r} is damaged: {name} is missing; {_OLDER}") from None
        except (OSError, ValueError, KeyError, TypeError):
            raise IndexDamagedError(
                f"index {str(self.folder)!r} is damaged: {name} is not readable; {_OLDER}"
            ) from None
        if newer:
            raise IndexDamagedError(
                f"index {str(self.folder)!r} has format {manifest['format']}, this mmalign reads up to "
                f"{FORMAT_VERSION}; upgrade with `pip install -U mmalign`"
            )
        if altered:
            raise IndexDamagedError(f"index {str(self.folder)!r} is damaged: {name} was altered; {_OLDER}")
        return manifest

    def _check_sizes(self, manifest: Manifest) -> Iterator[str]:
        for name, about in manifest["files"].items():
            problem = self._check_size(name, about)
            if problem:
                yield f"{name} {problem}"

    def _check_size(self, name: str, about: dict[str, Any]) -> str | None:
        try:
            size = (self.folder / name).stat().st_size
        except OSError:
            return "is missing"
        return None if size == about["size"] else f"has {size} bytes instead of {about['size']}"

    @contextlib.contextmanager
    def create(self) -> Iterator[Writer]:
        """As `write`, for a new index.

        Raises:
            InputError: there is one already.
        """
        self._refuse_existing()
        with self.write() as writer:
            self._refuse_existing()  # two first builds must not follow each other
            yield writer

    def _refuse_existing(self) -> None:
        if self.exists():
            raise InputError(f"{str(self.folder)!r} holds an index already; choose another folder, or update that one")

    @contextlib.contextmanager
    def write(self, *, wait: bool = False, brief: bool = False) -> Iterator[Writer]:
        """Hold the writer's lock; after an error, what belongs to no generation is cleared.

        Args:
            wait: for another writer to end, however long that takes.
            brief: others may wait for this one, which is about to publish and will be done soon.

        Raises:
            IndexLockedError: another process holds it.
            InputError: the folder cannot be written.
        """
        existed = self.folder.exists()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            foreign = (
                None
                if self.exists()
                else next((path.name for path in self.folder.iterdir() if not _OURS.fullmatch(path.name)), None)
            )
            if foreign is not None:
                raise InputError(
                    f"{str(self.folder)!r} is no index and holds other files ({foreign!r}); choose a new folder {_OUT}"
                )
            lock = filelock.FileLock(self.folder / "LOCK", timeout=0)
            self._acquire(lock, wait)
        except filelock.Timeout:
            raise IndexLockedError(
                f"index {str(self.folder)!r} is being written by {self._writer()}; wait for it to end"
            ) from None
        except (FileExistsError, NotADirectoryError):
            raise InputError(f"{str(self.folder)!r} is a file; choose a folder {_OUT}") from None
        except OSError as error:
            raise InputError(
                f"cannot write to {str(self.folder)!r} ({reason_of(error)}); choose another place {_OUT}"
            ) from None
        try:
            about = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%F %T"), "brief": brief}
            with full_disk_is_explained(self.folder):
                (self.folder / "writer.json").write_text(json.dumps(about), encoding="utf-8")
            writer = Writer(self)
            try:
                yield writer
            except BaseException:
                writer.abandon()
                raise
        finally:
            (self.folder / "writer.json").unlink(missing_ok=True)
            if not existed and not self.exists():
                (self.folder / "LOCK").unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    self.folder.rmdir()
            lock.release()

    def _acquire(self, lock: filelock.BaseFileLock, wait: bool) -> None:
        """Take the lock; writers that are brief are waited for."""
        first = time.monotonic()
        while True:
            try:
                lock.acquire()
                return
            except filelock.Timeout:
                about = self._about_writer()
                # One that has said nothing yet has only just begun.
                limit = 1.0 if not about else _BRIEF_SECONDS if about.get("brief") else 0.0
                if not wait and time.monotonic() - first >= limit:
                    raise
            time.sleep(0.05)

    def _about_writer(self) -> dict[str, Any]:
        try:
            about: dict[str, Any] = json.loads((self.folder / "writer.json").read_text(encoding="utf-8"))
            return about if isinstance(about, dict) else {}
        except (OSError, ValueError):
            return {}

    def _writer(self) -> str:
        about = self._about_writer()
        try:
            return f"process {about['pid']} on {about['host']} since {about['since']}"
        except KeyError:
            return "another process"


_UNALTERED: set[tuple[str, int, int, int]] = set()  # files that were hashed in this process
_BRIEF_SECONDS = 300.0  # for a writer that builds a large FAISS index before it publishes
_OUT = "with --out (out=...)"
_OLDER = (
    "an older manifest-*.json, if there is one, can be named in CURRENT; otherwise delete the index and make it again"
)


class Writer:
    """Adds files and publishes generations; made by `Store.write`."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.folder = store.folder
        self.written: dict[str, dict[str, Any]] = {}
        self._intact: set[str] = set()
        kept = store.read_unchecked() if store.exists() else None
        self.generation = self._highest() + 1
        self._count = 0
        self._clear(kept)

    def add(self, kind: str, fill: Callable[[IO[bytes]], object]) -> str:
        """Write one file of a kind (see `KINDS`, `UPGRADE_KINDS`) and return its name.

        `fill` gets a binary file; what it wrote is hashed and synced.
        """
        name = self._next_name(kind)
        temporary = self.folder / f".tmp-{name}"
        with full_disk_is_explained(self.folder):
            try:
                with temporary.open("wb") as file:
                    fill(file)
                    file.flush()
                    os.fsync(file.fileno())
                self.written[name] = {"size": temporary.stat().st_size, "sha256": sha256_of(temporary)}
                temporary.replace(self.folder / name)
                self._intact.add(name)
            finally:
                temporary.unlink(missing_ok=True)
        return name

    def _next_name(self, kind: str) -> str:
        name = f"{kind}-{self.generation:06d}-{self._count}.{_SUFFIXES[kind]}"
        self._count += 1
        return name

    def adopt(self, manifest: Manifest, folder: Path) -> tuple[Manifest, list[str]]:
        """Take in the files of another index, linked where the file system can, under names of this generation.

        Args:
            manifest: of the other; its own files alone, no upgrade.
            folder: where they are.

        Returns:
            The manifest with the new names, and these.
        """
        manifest = copy.deepcopy(manifest)
        names: list[str] = []

        def taken(name: str) -> str:
            fresh = self._link(folder / name, name.partition("-")[0])
            self.written[fresh] = manifest["files"][name]
            names.append(fresh)
            return fresh

        for segment in manifest["segments"]:
            segment["file"] = taken(segment["file"])
        for part in ("items", "metadata", "skipped"):
            manifest[part] = taken(manifest[part]) if manifest[part] else None
        for part in ("queries", "faiss"):
            if manifest[part]:
                manifest[part]["file"] = taken(manifest[part]["file"])
        return manifest, names

    def _link(self, path: Path, kind: str) -> str:
        name = self._next_name(kind)
        temporary = self.folder / f".tmp-{name}"
        with full_disk_is_explained(self.folder):
            try:
                try:
                    os.link(path, temporary)
                except OSError:
                    shutil.copyfile(path, temporary)
                    with temporary.open("rb+") as file:
                        os.fsync(file.fileno())
                temporary.replace(self.folder / name)
            finally:
                temporary.unlink(missing_ok=True)
        return name

    def publish(self, manifest: Manifest, names: list[str]) -> Manifest:
        """Make a generation of the named files, old or new, the one in force; returns its manifest."""
        previous = self.store.read_unchecked() if self.store.exists() else None
        known = {**(previous["files"] if previous else {}), **self.written}
        manifest = {
            **manifest,
            "format": FORMAT_VERSION,
            "generation": self.generation,
            "written": written_now(),
            "libraries": libraries("numpy", "pillow", *FAISS_DISTRIBUTIONS),
            "files": {name: known[name] for name in names},
        }
        name = f"manifest-{self.generation:06d}.json"
        sealed = json.dumps({"sha256": _seal(manifest), "manifest": manifest}, indent=1).encode()
        with full_disk_is_explained(self.folder):
            self._replace(name, sealed)  # and with it, in the folder, the names of all files written before
            self._replace("CURRENT", f"{name}\n".encode())
        self.generation += 1
        self._count = 0
        self._clear(manifest, previous)
        return manifest

    def require_intact(self, manifest: Manifest, names: Iterable[str]) -> None:
        """Before content of old files goes into new ones: a damaged file must not get a good checksum that way.

        Raises:
            IndexDamagedError: the SHA-256 of a file is not the recorded one.
        """
        for name, problem in self.damaged(manifest, names):
            raise IndexDamagedError(f"index {str(self.folder)!r} is damaged: {name} {problem}; {_repair(self.folder)}")

    def damaged(self, manifest: Manifest, names: Iterable[str], *, progress: bool = False) -> Iterator[tuple[str, str]]:
        """Those of the files that are not what was written, and how; each file is hashed once in a writer's life."""
        unknown = [name for name in names if name not in self._intact]
        for name, problem in self.store.check_contents(manifest, unknown, progress=progress):
            if problem:
                yield name, problem
            else:
                self._intact.add(name)

    def abandon(self) -> None:
        """After a failure: clear what belongs to no generation, so that a first build that failed leaves nothing."""
        with contextlib.suppress(OSError, MMAlignError):  # the failure itself is what is to be told
            self._clear(self.store.read_unchecked() if self.store.exists() else None)

    def _replace(self, name: str, content: bytes) -> None:
        temporary = self.folder / f".tmp-{name}"
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.folder / name)
        finally:
            temporary.unlink(missing_ok=True)
        self._sync_folder()

    def _sync_folder(self) -> None:
        if os.name == "posix":
            descriptor = os.open(self.folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def _highest(self) -> int:
        matches = (_OURS.fullmatch(path.name) for path in self.folder.iterdir())
        numbers = (number for match in matches if match for number in match.groups() if number)
        return max(map(int, numbers), default=0)

    def _clear(self, *kept: Manifest | None) -> None:
        """Remove what neither the generation in force nor the one before needs: leftovers of writers that died."""
        needed = {name for manifest in kept if manifest for name in manifest["files"]}
        needed |= {f"manifest-{manifest['generation']:06d}.json" for manifest in kept if manifest}
        needed |= {"CURRENT", "LOCK", "writer.json"}
        for path in self.folder.iterdir():
            if _OURS.fullmatch(path.name) and path.name not in needed:
                # Windows refuses while a reader has the file open; the next writer tries again.
                with contextlib.suppress(OSError):
                    path.unlink()


@contextlib.contextmanager
def full_disk_is_explained(folder: Path) -> Iterator[None]:
    """Turn an OSError of a write into an error that says what became of the index."""
    try:
        yield
    except OSError as error:
        if isinstance(error, MMAlignError):
            raise
        remedy = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "make the folder writable"
        raise InputError(
            f"writing to {str(folder)!r} failed ({error.strerror or error}); the index is as it was at the last "
            f"checkpoint; {remedy} and run the same command again"
        ) from None


def _seal(manifest: Manifest) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def find_index(path: str | os.PathLike[str]) -> Path:
    """The index folder for a path: itself, or `.mmalign` in it.

    Raises:
        InputError: neither is an index.
    """
    given = Path(path)
    for candidate in (given, given / DEFAULT_FOLDER):
        if Store(candidate).exists():
            return candidate
    if not given.exists():
        raise InputError(f"{str(given)!r} does not exist; give an index, or a folder indexed with `mmalign index`")
    raise InputError(
        f"{str(given)!r} is not an index and holds none; make one with `mmalign index {shlex.quote(os.fspath(given))}`"
    )


def find_index_above() -> Path | None:
    """The index of the working folder or of the nearest folder above that has one; `None` if none has."""
    for folder in (Path(), *Path.cwd().parents):
        for candidate in (folder, folder / DEFAULT_FOLDER):
            if Store(candidate).exists():
                return candidate
    return None


def verify_command(folder: Path, *, repair: bool = False) -> str:
    """What to paste to have an index checked, or mended."""
    return f"`mmalign verify {shlex.quote(os.fspath(folder))}{' --repair' if repair else ''}`"


def _repair(folder: Path) -> str:
    return f"{verify_command(folder)} names every damaged file and the remedy"
