"""Every image of a set decoded in full, once: what it is, or why it cannot be used."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import UInt8
from torch import Tensor

from mmalign.errors import UnreadableImageError
from mmalign.imaging import FileContent, read_file, read_image

from .rows import MAX_PIXELS, MIN_SIDE, ImageRef

__all__ = ["ImageTable", "ImageVerdict", "read_row_image"]


@dataclass(frozen=True, slots=True)
class ImageVerdict:
    """`image` where it was decoded; `reason` and `detail` where it cannot be used; `flags` of `mmalign.imaging`."""

    image: ImageRef | None = None
    flags: tuple[str, ...] = ()
    reason: str | None = None
    detail: str = ""


def read_row_image(
    image: bytes | Path | None, *, name: str, sha256: str, max_pixels: int | None = None
) -> UInt8[Tensor, "3 height width"]:
    """Decode an image of a checked row again.

    Args:
        image: of `RowSource.row(...).images`.
        name: of the row, for messages.
        sha256: of the image's bytes when it was checked.
        max_pixels: see `mmalign.imaging.read_image`.

    Raises:
        UnreadableImageError: it cannot be read, or is another one by now (reason "changed").
    """
    if image is None:
        raise UnreadableImageError("missing", f"an image of {name} is gone since it was checked; check the data again")
    content = read_file(image) if isinstance(image, Path) else _content(image, name)
    if content.sha256 != sha256:
        raise UnreadableImageError(
            "changed", f"an image of {name} has changed since it was checked; check the data again"
        )
    return read_image(content, max_pixels=max_pixels).pixels


class ImageTable:
    """Verdicts by content, and for files by path, size and modification time. Safe to use from many threads.

    Args:
        max_pixels: images of more pixels are "too_large", and not decoded.
        min_side: images with a shorter side, in pixels, are "too_small".
    """

    def __init__(self, *, max_pixels: int = MAX_PIXELS, min_side: int = MIN_SIDE) -> None:
        self._max_pixels, self._min_side = max_pixels, min_side
        self._lock = threading.Lock()
        self._known: dict[object, ImageVerdict | Future[ImageVerdict]] = {}

    def look(self, source: bytes | Path | None) -> ImageVerdict:
        """The verdict on encoded bytes or a file."""
        if source is None:
            return ImageVerdict(reason="missing", detail="has neither bytes nor a path")
        if isinstance(source, Path):
            try:
                status = source.stat()
            except (OSError, ValueError):  # `read_file` gives the reason
                return self._look_into(source)
            key = (str(source), status.st_size, status.st_mtime_ns)
            return self._once(key, lambda: self._look_into(source))
        content = _content(source, _NAME)
        return self._once(content.sha256, lambda: self._decode(content))

    def _look_into(self, path: Path) -> ImageVerdict:
        try:
            content = read_file(path)
        except UnreadableImageError as error:
            return ImageVerdict(reason=error.reason, detail=str(error).removeprefix(f"{str(path)!r}: "))
        content = FileContent(content.data, content.size, content.mtime_ns, content.sha256, _NAME)
        return self._once(content.sha256, lambda: self._decode(content))

    def _once(self, key: object, make: Callable[[], ImageVerdict]) -> ImageVerdict:
        """What `make` returns; a second thread that asks meanwhile waits for the first."""
        mine: Future[ImageVerdict] = Future()
        with self._lock:
            known = self._known.setdefault(key, mine)
        if known is not mine:
            return known.result() if isinstance(known, Future) else known
        try:
            verdict = make()
        except BaseException as error:
            mine.set_exception(error)
            raise
        self._known[key] = verdict
        mine.set_result(verdict)
        return verdict

    def _decode(self, content: FileContent) -> ImageVerdict:
        if not content.data:
            return ImageVerdict(reason="empty", detail="has 0 bytes")
        try:
            decoded = read_image(content, max_pixels=self._max_pixels)
        except UnreadableImageError as error:
            return ImageVerdict(reason=error.reason, detail=str(error).removeprefix(f"{_NAME}: "))
        image = ImageRef(content.sha256, decoded.height, decoded.width)
        if min(image.height, image.width) < self._min_side:
            detail = f"is {image.width}x{image.height} pixels, its short side below {self._min_side}"
            return ImageVerdict(image, decoded.flags, "too_small", detail)
        return ImageVerdict(image, decoded.flags)


def _content(data: bytes, name: str) -> FileContent:
    return FileContent(data, len(data), 0, hashlib.sha256(data).hexdigest(), name)


# One image may lie in many rows: its name is put before the verdict where it is reported.
_NAME = "image"
