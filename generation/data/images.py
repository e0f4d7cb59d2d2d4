"""Every image of a set decoded in full, once: what it is, or why it cannot be used."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from mmalign.errors import UnreadableImageError
from mmalign.imaging import FileContent, read_file, read_image

from .rows import ImageRef

__all__ = ["ImageTable", "ImageVerdict"]


@dataclass(frozen=True, slots=True)
class ImageVerdict:
    """`image` where it was decoded; `reason` and `detail` where it cannot be used; `flags` of `mmalign.imaging`."""

    image: ImageRef | None = None
    flags: tuple[str, ...] = ()
    reason: str | None = None
    detail: str = ""


class ImageTable:
    """Verdicts by content, and for files by path, size and modification time. Safe to use from many threads.

    Args:
        max_pixels: images of more pixels are "too_large", and not decoded.
        min_side: images with a shorter side, in pixels, are "too_small".
    """

    def __init__(self, *, max_pixels: int, min_side: int) -> None:
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
        content = FileContent(source, len(source), 0, hashlib.sha256(source).hexdigest(), _NAME)
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


# One image may lie in many rows: its name is put before the verdict where it is reported.
_NAME = "image"
