"""Reading a file once, checking it, decoding it: `read_file` and `read_image`."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from ..checks import at_least
from ..errors import InputError, reason_of
from .decoding import array_to_rgb, decode_jpeg, decode_with_pillow, no_size_warning
from .identifying import (
    DEFAULT_MAX_PIXELS,
    JPEG_END,
    UNDECODABLE,
    explain,
    is_cut,
    open_header,
    png_checksums_hold,
    refusal,
)

__all__ = [
    "DEFAULT_DECODING",
    "DEFAULT_MAX_PIXELS",
    "FLAGS",
    "MAX_FILE_BYTES",
    "REASONS",
    "DecodeSettings",
    "DecodedImage",
    "FileContent",
    "read_file",
    "read_image",
]

REASONS = (
    "missing",  # no such file; a symbolic link to nothing
    "permission",
    "not_a_file",  # directory, FIFO, socket, device
    "empty",
    "not_an_image",
    "truncated",  # the data end before the image does
    "corrupt",  # recognised, but its content contradicts itself
    "too_large",  # more than `max_pixels` pixels or `MAX_FILE_BYTES` bytes, or more than memory holds
    "unsupported",  # recognised, but no decoder for it is installed or safe to run
    "changed",  # the file changed while it was read, twice
    "unreadable",  # any other error of the operating system
)

FLAGS = (
    "exif_orientation",  # turned or mirrored as its metadata ask
    "bad_exif",  # metadata could not be parsed: orientation unknown, taken as upright
    "alpha",  # had transparency: composited on `background`
    "palette",
    "grayscale",  # one channel, repeated three times
    "16bit",  # divided by 257
    "float",  # [0, 1] times 255, other ranges stretched from minimum to maximum
    "int32",  # 32-bit integers beyond 16 bit: stretched from minimum to maximum
    "cmyk",
    "colorspace",  # YCbCr (not of a JPEG), LAB or HSV
    "first_frame",  # animation or several pages: the first one
    "truncated",  # incomplete, and `tolerate_truncation` was set: what is missing is flat
    "extreme_aspect",  # one side more than 50 times the other
    "fast_decode",  # JPEG decoded at reduced size
)

# 179 megapixels of uncompressed 16-bit RGBA, with room for metadata.
MAX_FILE_BYTES = 2 * 1024**3

_EXTREME_ASPECT = 50

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | FileContent | Image.Image | np.ndarray | Tensor"


@dataclass(frozen=True)
class DecodeSettings:
    """How files become pixels, wherever images are to be compared: the same for an index and its queries.

    Attributes:
        fast_decode: let JPEGs be decoded at reduced size, at least twice the target: faster on large photographs, only
            nearly the same pixels.
        tolerate_truncation: keep images whose end is missing, flagged.
        max_pixels: refuse larger images; `None` is the reader's own limit.
    """

    fast_decode: bool = False
    tolerate_truncation: bool = False
    max_pixels: int | None = None

    def read(self, image: ImageSource, target: tuple[int, int]) -> DecodedImage:
        """`read_image` by these settings, for an encoder whose input has `target` (height, width).

        Raises:
            UnreadableImageError: it cannot be read.
        """
        return read_image(
            image,
            max_pixels=self.max_pixels,
            fast_decode=target if self.fast_decode else None,
            tolerate_truncation=self.tolerate_truncation,
        )


DEFAULT_DECODING = DecodeSettings()


@dataclass(frozen=True, slots=True)
class FileContent:
    """The bytes of one file at one moment; `sha256` is hexadecimal, `mtime_ns` in nanoseconds, `name` for messages."""

    data: bytes
    size: int
    mtime_ns: int
    sha256: str
    name: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class DecodedImage:
    """Upright RGB pixels in [0, 255], the format they came from, and what was out of the ordinary (`FLAGS`).

    The memory of `pixels` is laid out channels-last, which the resize kernels are fastest on.
    """

    pixels: UInt8[Tensor, "3 height width"]
    format: str
    flags: tuple[str, ...]

    @property
    def width(self) -> int:
        """Pixels from left to right."""
        return int(self.pixels.shape[2])

    @property
    def height(self) -> int:
        """Pixels from top to bottom."""
        return int(self.pixels.shape[1])

    def to_pil(self) -> Image.Image:
        """A Pillow image in mode RGB with the same pixels."""
        return Image.fromarray(self.pixels.permute(1, 2, 0).contiguous().numpy())


def read_file(path: str | os.PathLike[str]) -> FileContent:
    """Read a regular file at once, and hash it.

    Symbolic links are followed. A directory, FIFO, socket or device is refused without being opened. A file
    whose size or modification time differs before and after is read a second time.

    Raises:
        UnreadableImageError: reason "missing", "permission", "not_a_file", "empty", "too_large" (more than
            `MAX_FILE_BYTES`), "changed" or "unreadable".
    """
    name = repr(os.fsdecode(path))
    for _ in range(2):
        try:
            before = Path(path).stat()
            if not stat.S_ISREG(before.st_mode):
                raise refusal("not_a_file", name, "is not a regular file")
            if before.st_size > MAX_FILE_BYTES:
                raise refusal("too_large", name, f"has {before.st_size} bytes, more than {MAX_FILE_BYTES}")
            # O_NONBLOCK: were a FIFO put in the file's place since the stat, opening it must not wait.
            flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
            with open(os.open(path, flags | getattr(os, "O_CLOEXEC", 0)), "rb", buffering=0) as file:
                data = file.readall()
                after = os.fstat(file.fileno())
        except (FileNotFoundError, NotADirectoryError):
            raise refusal("missing", name, "does not exist, or is a link to nothing") from None
        except PermissionError:
            raise refusal("permission", name, "may not be read by this user") from None
        except (OSError, ValueError, MemoryError) as error:  # ValueError: a null character in the path
            loop = isinstance(error, OSError) and error.errno == errno.ELOOP
            detail = "is a symbolic link to itself" if loop else f"cannot be read: {reason_of(error)}"
            raise refusal("unreadable", name, detail) from error
        unchanged = (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
        if unchanged and len(data) == after.st_size:
            break
    else:
        raise refusal("changed", name, "changed while it was read, twice; try again when it is complete")
    if not data:
        raise refusal("empty", name, "has 0 bytes")
    return FileContent(data, len(data), after.st_mtime_ns, hashlib.sha256(data).hexdigest(), name)


def read_image(
    source: ImageSource,
    *,
    max_pixels: int | None = None,
    fast_decode: tuple[int, int] | None = None,
    tolerate_truncation: bool = False,
    background: tuple[int, int, int] = (255, 255, 255),
) -> DecodedImage:
    """Decode an image to upright 8-bit RGB, whatever it is stored as. Safe to call from many threads.

    The content decides about the format, not the file's suffix. HEIC needs `pip install mmalign[heif]`.

    Args:
        source: path, file content, Pillow image, array (height x width, or x 3, or x 4 with alpha; uint8,
            uint16 or float in [0, 1]) or tensor (3 x height x width; likewise).
        max_pixels: refuse a file or Pillow image of more pixels before decoding it; None is
            `DEFAULT_MAX_PIXELS`. Above that, Pillow's own limits still hold for some formats.
        fast_decode: (height, width) that the image will be resized to. JPEGs are then decoded at 1/2, 1/4 or
            1/8 of their size as long as that is at least twice this. Faster for large photos, but only
            approximate: an index and its queries should use the same setting.
        tolerate_truncation: decode what there is of an incomplete file, where its decoder can (JPEG, PNG,
            GIF, BMP, uncompressed TIFF), instead of raising; the rest is flat.
        background: colour in [0, 255] under transparent pixels.

    Raises:
        UnreadableImageError: with a reason from `REASONS`; the message is one line and names the path.
        InputError: an array or tensor of another shape, type or range, or another argument out of range.
    """
    if len(background) != 3 or not all(0 <= value <= 255 for value in background):
        raise InputError(f"background must be three values in [0, 255], not {background!r}")
    limit = DEFAULT_MAX_PIXELS if max_pixels is None else max_pixels
    at_least("max_pixels", limit)
    if fast_decode is not None and (len(fast_decode) != 2 or min(fast_decode) < 1):
        raise InputError(f"fast_decode must be a (height, width) of at least 1, not {fast_decode!r}")

    flags: set[str] = set()
    if isinstance(source, np.ndarray | Tensor):
        return _finish(array_to_rgb(source, background, flags), type(source).__name__, flags)
    if isinstance(source, Image.Image):
        name, data, header = "Pillow image", b"", source
    else:
        name, data = _named_bytes(source)
        header = open_header(data, name)

    width, height = header.size
    image_format = header.format or "PIL"
    if width * height > limit:
        raise refusal("too_large", name, f"{width}x{height} pixels are more than the limit of {limit}")
    if image_format in UNDECODABLE:
        raise refusal("unsupported", name, f"{image_format} is not decoded; convert it to PNG or JPEG")
    if data and is_cut(data, image_format):
        if not tolerate_truncation:
            raise refusal("truncated", name, f"{image_format} data end before the image does")
        flags.add("truncated")
        if image_format in ("JPEG", "MPO"):
            data += JPEG_END
            header = open_header(data, name)
    if image_format == "PNG" and data and not png_checksums_hold(data):
        raise refusal("corrupt", name, "a checksum of the PNG data is wrong")

    try:
        with no_size_warning(width * height):
            if data and image_format in ("JPEG", "MPO"):
                pixels = decode_jpeg(header, data, fast_decode, tolerate_truncation, flags)
            else:
                pixels = decode_with_pillow(header, data, tolerate_truncation, background, flags)
    except Exception as error:
        raise explain(error, data, image_format, name) from error
    return _finish(pixels, image_format, flags)


def _finish(pixels: Tensor, image_format: str, flags: set[str]) -> DecodedImage:
    height, width = pixels.shape[1:]
    if max(height, width) > _EXTREME_ASPECT * min(height, width):
        flags.add("extreme_aspect")
    channels_last = pixels.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    return DecodedImage(channels_last, image_format, tuple(flag for flag in FLAGS if flag in flags))


def _named_bytes(source: Any) -> tuple[str, bytes]:
    if isinstance(source, FileContent):
        if source.name and source.data:
            return source.name, source.data
        source = source.data
    if isinstance(source, bytes | bytearray | memoryview):
        name = f"{len(source)} bytes of image data"
        if not len(source):
            raise refusal("empty", name, "nothing to decode")
        return name, bytes(source)
    if isinstance(source, str | os.PathLike):
        return repr(os.fsdecode(source)), read_file(source).data
    kind = type(source).__name__
    raise InputError(f"an image must be a path, bytes, Pillow image, array or tensor, not {kind}")
