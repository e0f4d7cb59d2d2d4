"""What is to be encoded, known by its content: hashes, equal items, and what cannot be read."""

from __future__ import annotations

import contextlib
import hashlib
import os
from typing import Any, cast

from ..errors import InputError, UnreadableImageError
from ..imaging import DecodeSettings, FileContent, read_file, read_image
from ..prefetch import prefetch
from ..progress import progress_bar

__all__ = ["by_content", "hash_items", "report", "unchanged"]


def hash_items(
    items: list[Any], modality: str, decode: DecodeSettings, *, workers: int | None, progress: bool
) -> tuple[list[str], dict[int, UnreadableImageError]]:
    """One SHA-256 an item; "" for what cannot be read, and row -> why."""
    if modality == "text":
        return [hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest() for text in items], {}
    content: list[str] = []
    failures: dict[int, UnreadableImageError] = {}
    found = prefetch(items, lambda item: _hash_image(item, decode), ahead=256, workers=workers)
    bar = progress_bar("hashing images", len(items), enabled=progress)
    with contextlib.closing(cast("Any", found)), bar as advance:
        for row, (_, digest) in enumerate(found):
            if isinstance(digest, UnreadableImageError):
                failures[row] = digest
            content.append("" if isinstance(digest, UnreadableImageError) else digest)
            advance()
    return content, failures


def _hash_image(item: Any, decode: DecodeSettings) -> str:
    if isinstance(item, FileContent):
        return item.sha256
    if isinstance(item, str | os.PathLike):
        return read_file(item).sha256
    if isinstance(item, bytes | bytearray | memoryview):
        return hashlib.sha256(item).hexdigest()
    pixels = read_image(item, max_pixels=decode.max_pixels).pixels.permute(1, 2, 0).contiguous().numpy()
    return hashlib.sha256(f"{pixels.shape}".encode() + pixels.tobytes()).hexdigest()


def by_content(content: list[str]) -> list[list[int]]:
    """Rows of equal content together, in the order of their first; a file that cannot be read is like no other."""
    groups: dict[str | int, list[int]] = {}
    for row, digest in enumerate(content):
        groups.setdefault(digest or row, []).append(row)
    return list(groups.values())


def unchanged(item: Any, digest: str) -> Any:
    """The item, a file as its bytes.

    Raises:
        InputError: the file is not what it was when it was hashed.
    """
    if not isinstance(item, str | os.PathLike):
        return item
    try:
        file = read_file(item)
    except UnreadableImageError as error:
        raise InputError(f"{error}, though it could be read before; run again") from None
    if file.sha256 != digest:
        raise InputError(f"{file.name} has changed since the extraction began; run again when nothing writes there")
    return file


def report(item: Any, row: int, error: UnreadableImageError) -> dict[str, Any]:
    """An entry of `Features.skipped`."""
    named = isinstance(item, str | os.PathLike)
    name = os.fsdecode(item) if named else getattr(item, "name", "") or f"{type(item).__name__} {row}"
    return {"row": row, "name": name, "reason": error.reason, "message": str(error)}
