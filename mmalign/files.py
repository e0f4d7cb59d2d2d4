"""Writing files and folders that are there whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .errors import InputError, reason_of

__all__ = ["load_tensors", "read_object", "save_tensors", "sha256_of", "whole_file", "whole_folder"]


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str], *, durable: bool = False, remedy: str = "") -> Iterator[Path]:
    """Yield a hidden path beside `path`, of the same suffix; what was written there gets the name at the end.

    A failure, or a kill, leaves what was there before. Folders above are made.

    Args:
        path: the file to be, replaced if it exists.
        durable: reach the disk before the name does, for what a power cut must not take.
        remedy: what to do where it cannot be written; choose another place or make room, by default.

    Raises:
        InputError: it cannot be written.
    """
    target = Path(path)
    fresh = _hidden(target)
    with _explained(target, remedy):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield fresh
            if durable:
                _sync(fresh)
            fresh.replace(target)
        finally:
            with contextlib.suppress(OSError):
                fresh.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike[str], *, remedy: str = "") -> Iterator[Path]:
    """Yield a fresh hidden folder beside `path`, which takes its place at the end; a failure leaves what was there.

    Raises:
        InputError: it cannot be written.
    """
    target = Path(path)
    fresh, previous = _hidden(target), _hidden(target)
    with _explained(target, remedy):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            fresh.mkdir()
            yield fresh
            if target.exists():
                target.rename(previous)
            try:
                fresh.rename(target)
            except OSError:
                if previous.exists():
                    previous.rename(target)
                raise
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
            if target.exists():
                shutil.rmtree(previous, ignore_errors=True)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write safetensors whose bytes follow from the arguments, and which others may read too.

    The safetensors library writes metadata in an order of chance, and files for their owner alone.
    """
    from safetensors.torch import save_file

    detached = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    save_file(detached, path, metadata=dict(metadata) if metadata else None)
    path.chmod(0o644)
    if metadata and len(metadata) > 1:
        _sort_metadata(path)


def load_tensors(path: str | os.PathLike[str], kind: str, remedy: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file that `save_tensors` wrote with `format` in its metadata.

    Args:
        path: of the file.
        kind: what `format` has to be: "mmalign NAME VERSION".
        remedy: what to do where the file is not to be read.

    Raises:
        InputError: there is no such file, or it is damaged or of another kind.
    """
    from safetensors import SafetensorError, safe_open

    name = " ".join(kind.split()[1:-1])
    try:
        with safe_open(path, "pt") as file:
            about, tensors = file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(f"{name} {os.fspath(path)!r} cannot be read ({reason_of(error)}); {remedy}") from None
    if about.get("format") != kind:
        raise InputError(f"{os.fspath(path)!r} holds no {name}; give a file that was saved as one")
    return tensors, about


def _sort_metadata(path: Path) -> None:
    with path.open("rb+") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= size:  # it is, by what is known of how the library writes; padded with blanks, as it does
            file.seek(8)
            file.write(text.ljust(size))


def read_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The object in a JSON file; `{}` where there is none that can be read."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _hidden(target: Path) -> Path:
    return target.with_name(f".{target.stem[:40]}-{uuid.uuid4().hex[:12]}{target.suffix}")


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def _explained(target: Path, remedy: str) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        remedy = remedy or "choose another place, or make room"
        raise InputError(f"{str(target)!r} cannot be written ({reason_of(error)}); {remedy}") from None
