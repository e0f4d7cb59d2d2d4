"""The library's one reader of image files, and the preprocessing between its pixels and an encoder.

A file is read once (`read_file`), identified by its header, checked, and only then decoded (`read_image`).
What is wrong with it becomes an `UnreadableImageError` with a reason from `REASONS`; what is out of the
ordinary but readable is decoded and named in `DecodedImage.flags`. `ImagePreprocessing` takes the pixels to
an encoder's input: uint8 as the encoder's authors do with Pillow, float differentiably.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import stat
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageFile
from torch import Tensor

from .errors import InputError, UnreadableImageError

__all__ = [
    "DEFAULT_MAX_PIXELS",
    "FLAGS",
    "MAX_FILE_BYTES",
    "REASONS",
    "DecodedImage",
    "FileContent",
    "ImagePreprocessing",
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

# Twice Pillow's MAX_IMAGE_PIXELS, the size that Pillow itself refuses: 179 megapixels.
DEFAULT_MAX_PIXELS = 178_956_970
# 179 megapixels of uncompressed 16-bit RGBA, with room for metadata.
MAX_FILE_BYTES = 2 * 1024**3

_EXTREME_ASPECT = 50
# Identified by Pillow, but not decoded at all, or only by starting another program on an untrusted file.
_UNDECODABLE = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})
# Their signatures are long enough that a file which fails to parse is a damaged image, not something else.
_SIGNED = frozenset(("AVIF", "GIF", "HEIF", "ICNS", "ICO", "JPEG", "JPEG2000", "PNG", "PSD", "QOI", "TIFF", "WEBP"))
_HEIF_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1", b"avif", b"avis"})
_JPEG_END = b"\xff\xd9"

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | FileContent | Image.Image | np.ndarray | Tensor"


@dataclass(frozen=True, slots=True)
class FileContent:
    """The bytes of one file at one moment; `sha256` is hexadecimal, `mtime_ns` in nanoseconds."""

    data: bytes
    size: int
    mtime_ns: int
    sha256: str


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
                raise _refusal("not_a_file", name, "is not a regular file")
            if before.st_size > MAX_FILE_BYTES:
                raise _refusal("too_large", name, f"has {before.st_size} bytes, more than {MAX_FILE_BYTES}")
            # O_NONBLOCK: were a FIFO put in the file's place since the stat, opening it must not wait.
            flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
            with open(os.open(path, flags | getattr(os, "O_CLOEXEC", 0)), "rb", buffering=0) as file:
                data = file.readall()
                after = os.fstat(file.fileno())
        except (FileNotFoundError, NotADirectoryError):
            raise _refusal("missing", name, "does not exist, or is a link to nothing") from None
        except PermissionError:
            raise _refusal("permission", name, "may not be read by this user") from None
        except (OSError, ValueError, MemoryError) as error:  # ValueError: a null character in the path
            loop = isinstance(error, OSError) and error.errno == errno.ELOOP
            detail = "is a symbolic link to itself" if loop else f"cannot be read: {_one_line(error)}"
            raise _refusal("unreadable", name, detail) from error
        unchanged = (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
        if unchanged and len(data) == after.st_size:
            break
    else:
        raise _refusal("changed", name, "changed while it was read, twice; try again when it is complete")
    if not data:
        raise _refusal("empty", name, "has 0 bytes")
    return FileContent(data, len(data), after.st_mtime_ns, hashlib.sha256(data).hexdigest())


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
    if limit < 1:
        raise InputError(f"max_pixels must be at least 1, not {max_pixels!r}")
    if fast_decode is not None and (len(fast_decode) != 2 or min(fast_decode) < 1):
        raise InputError(f"fast_decode must be a (height, width) of at least 1, not {fast_decode!r}")

    flags: set[str] = set()
    if isinstance(source, np.ndarray | Tensor):
        return _finish(_array_to_rgb(source, background, flags), type(source).__name__, flags)
    if isinstance(source, Image.Image):
        name, data, header = "Pillow image", b"", source
    else:
        name, data = _named_bytes(source)
        header = _open_header(data, name)

    width, height = header.size
    image_format = header.format or "PIL"
    if width * height > limit:
        raise _refusal("too_large", name, f"{width}x{height} pixels are more than the limit of {limit}")
    if image_format in _UNDECODABLE:
        raise _refusal("unsupported", name, f"{image_format} is not decoded; convert it to PNG or JPEG")
    if data and _is_cut(data, image_format):
        if not tolerate_truncation:
            raise _refusal("truncated", name, f"{image_format} data end before the image does")
        flags.add("truncated")
        if image_format in ("JPEG", "MPO"):
            data += _JPEG_END
            header = _open_header(data, name)
    if image_format == "PNG" and data and not _png_checksums_hold(data):
        raise _refusal("corrupt", name, "a checksum of the PNG data is wrong")

    try:
        with _no_size_warning(width * height):
            if data and image_format in ("JPEG", "MPO"):
                pixels = _decode_jpeg(header, data, fast_decode, tolerate_truncation, flags)
            else:
                pixels = _decode_with_pillow(header, data, tolerate_truncation, background, flags)
    except Exception as error:
        raise _explain(error, data, image_format, name) from error
    return _finish(pixels, image_format, flags)


def _finish(pixels: Tensor, image_format: str, flags: set[str]) -> DecodedImage:
    height, width = pixels.shape[1:]
    if max(height, width) > _EXTREME_ASPECT * min(height, width):
        flags.add("extreme_aspect")
    channels_last = pixels.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    return DecodedImage(channels_last, image_format, tuple(flag for flag in FLAGS if flag in flags))


def _refusal(reason: str, name: str, detail: str) -> UnreadableImageError:
    return UnreadableImageError(reason, f"{name}: {detail}")


def _one_line(error: BaseException) -> str:
    """The error's text without control characters (it may quote a file name), at most 200 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:200])


def _named_bytes(source: Any) -> tuple[str, bytes]:
    if isinstance(source, FileContent):
        source = source.data
    if isinstance(source, bytes | bytearray | memoryview):
        name = f"{len(source)} bytes of image data"
        if not len(source):
            raise _refusal("empty", name, "nothing to decode")
        return name, bytes(source)
    if isinstance(source, str | os.PathLike):
        return repr(os.fsdecode(source)), read_file(source).data
    kind = type(source).__name__
    raise InputError(f"an image must be a path, bytes, Pillow image, array or tensor, not {kind}")


def _ends_early(error: Exception, data: bytes, image_format: str) -> bool:
    """Whether decoding failed for want of data, rather than because of what the data say."""
    announced = isinstance(error, EOFError) or "truncated" in str(error).lower()
    return announced or (bool(data) and _is_cut(data, image_format))


def _explain(error: Exception, data: bytes, image_format: str, name: str) -> UnreadableImageError:
    text = _one_line(error)
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning | MemoryError):
        return _refusal("too_large", name, f"{image_format}: {text}")
    if _ends_early(error, data, image_format):
        return _refusal("truncated", name, f"{image_format} data end before the image does ({text})")
    return _refusal("corrupt", name, f"{image_format} data cannot be decoded ({text})")


# --- Identification

_plugin_lock = threading.Lock()
_plugin_formats: tuple[str, ...] = ()


def _formats() -> tuple[str, ...]:
    """Pillow's formats, the common ones first; loads its plugins, and pillow-heif's, the first time."""
    global _plugin_formats
    with _plugin_lock:
        if not _plugin_formats:
            Image.preinit()
            Image.init()
            try:
                import pillow_heif
            except ImportError:
                pass
            else:
                pillow_heif.register_heif_opener()
                if "AVIF" not in Image.OPEN and hasattr(pillow_heif, "register_avif_opener"):
                    pillow_heif.register_avif_opener()
            _plugin_formats = tuple(Image.ID)
    return _plugin_formats


def _open_header(data: bytes, name: str) -> Image.Image:
    """`Image.open` without its check of the size, whose limit and warning are settings of the process."""
    failure: tuple[Exception, str] | None = None
    for image_format in _formats():
        factory, accept = Image.OPEN[image_format]
        try:
            accepted = accept(data[:16]) if accept else True
            if isinstance(accepted, str):
                raise _refusal("unsupported", name, accepted)
            if accepted:
                return factory(io.BytesIO(data), "")
        except UnreadableImageError:
            raise
        except Exception as error:
            if image_format in _SIGNED or isinstance(error, Image.DecompressionBombError):
                failure = failure or (error, image_format)
    if failure:
        raise _explain(failure[0], data, failure[1], name)
    if data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS:
        raise _refusal("unsupported", name, "HEIC and AVIF need `pip install mmalign[heif]`")
    raise _refusal("not_an_image", name, "is not an image of a known format")


def _is_cut(data: bytes, image_format: str) -> bool:
    """Whether the data end before what the format's own lengths and end markers announce."""
    if image_format in ("JPEG", "MPO", "JPEG2000"):  # end with the same marker
        return data.rfind(_JPEG_END, max(_jpeg_scan(data), 0)) < 0
    if image_format == "PNG":
        return not any(kind == b"IEND" for kind, _, _ in _png_chunks(data))
    if image_format == "GIF":  # within the header; frames have no lengths
        return len(data) < 13 or len(data) < 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
    if image_format == "WEBP":
        return len(data) < 8 + int.from_bytes(data[4:8], "little")
    if image_format == "TIFF":
        return len(data) <= int.from_bytes(data[4:8], "little" if data[:2] == b"II" else "big")
    if image_format in ("AVIF", "HEIF"):
        box = 0
        while box + 8 <= len(data):
            size = int.from_bytes(data[box : box + 4], "big")
            if size < 8:  # 0: up to the end; 1: a 64-bit length, which no still image needs
                return False
            box += size
        return box != len(data)
    return False


def _png_chunks(data: bytes) -> list[tuple[bytes, int, int]]:
    """Type, start and end of every complete chunk, the checksum excluded."""
    chunks, position = [], 8
    while position + 12 <= len(data):
        end = position + 8 + int.from_bytes(data[position : position + 4], "big")
        if end + 4 > len(data):
            break
        chunks.append((data[position + 4 : position + 8], position + 4, end))
        if chunks[-1][0] == b"IEND":
            break
        position = end + 4
    return chunks


def _png_checksums_hold(data: bytes) -> bool:
    # Pillow skips the checksums of pixel data; some flipped bits would otherwise pass as another picture.
    view = memoryview(data)
    return all(
        zlib.crc32(view[start:end]) == int.from_bytes(view[end : end + 4], "big")
        for kind, start, end in _png_chunks(data)
        if kind[:1].isupper()
    )


# --- Decoding

_warnings_lock = threading.Lock()


@contextmanager
def _no_size_warning(pixels: int) -> Iterator[None]:
    """Silence Pillow's warning of large images; one thread at a time, as warning filters are process-wide."""
    if pixels <= DEFAULT_MAX_PIXELS // 2:
        yield
        return
    with _warnings_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def _jpeg_scan(data: bytes) -> int:
    """Where the first scan's header starts; -1 if the segments do not lead to one."""
    position = 2
    while data[position : position + 1] == b"\xff":
        if data[position + 1 : position + 2] == b"\xff":  # padding
            position += 1
        elif data[position + 1 : position + 2] == b"\xda":
            return position
        else:
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return -1


def _decode_jpeg(
    header: Image.Image, data: bytes, fast_decode: tuple[int, int] | None, tolerate: bool, flags: set[str]
) -> Tensor:
    orientation = _orientation(header, flags)
    if fast_decode is not None:
        height, width = fast_decode if orientation < 5 else fast_decode[::-1]
        full_size = header.size
        header.draft(header.mode, (2 * width, 2 * height))
        if header.size != full_size:
            flags.add("fast_decode")
    if getattr(header, "is_animated", False):
        flags.add("first_frame")
    pixels = None
    if header.mode in ("RGB", "L") and "fast_decode" not in flags:
        from torchvision.io import ImageReadMode, decode_jpeg

        try:
            # torchvision lets other threads run, and is twice as fast as Pillow for the same pixels.
            pixels = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
        except RuntimeError:
            pixels = None  # Pillow, the reference, decides and gives the reason
    if header.mode == "L":
        flags.add("grayscale")
    if pixels is None:
        pixels = _to_rgb(header, (255, 255, 255), flags)
    if "truncated" not in flags and _jpeg_lacks_data(pixels, data):
        if not tolerate:
            raise EOFError("the scan holds fewer rows than the header declares")
        flags.add("truncated")
    return _turn(pixels, orientation)


def _jpeg_lacks_data(pixels: Tensor, data: bytes) -> bool:
    """Whether the decoder ran out of scan data, which it fills up with mid-gray, silently.

    A last pixel of that gray is suspicious but may be real. Data put after a complete scan change nothing;
    after an incomplete one they become pixels.
    """
    if (pixels[:, -1, -1] != 128).any():
        return False
    scan_end = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]").search(data, max(_jpeg_scan(data), 0) + 2)
    if scan_end is None:
        return False
    filler = b"".join(bytes(range(255)) + bytes([0xFF, 0xD0 + i]) for i in range(8))  # also across restarts
    image = _open_header(data[: scan_end.start()] + filler + data[scan_end.start() :], "")
    image.draft(image.mode, (pixels.shape[2], pixels.shape[1]))
    refilled = _to_rgb(image, (255, 255, 255), set())
    return refilled.shape == pixels.shape and bool((refilled.int() - pixels.int()).abs().max() > 32)


def _decode_with_pillow(
    image: Image.Image, data: bytes, tolerate: bool, background: tuple[int, int, int], flags: set[str]
) -> Tensor:
    try:
        several = image.format != "PSD" and getattr(image, "is_animated", False)  # a PSD's frames are layers
    except Exception:
        several = True  # the frame after the first is damaged
    if several:
        flags.add("first_frame")
    turned_by_pillow = 1
    if image.format == "TIFF":  # Pillow turns it upright while loading
        turned_by_pillow = getattr(image, "tag_v2", {}).get(0x0112, 1)
    if any(";16" in _raw_mode(tile) for tile in getattr(image, "tile", ())):
        flags.add("16bit")
    try:
        image.load()
    except Exception as error:
        if not (tolerate and isinstance(image, ImageFile.ImageFile)):
            raise
        if not _ends_early(error, data, image.format or ""):
            raise
        # The rows decoded so far are in place: without tiles left to decode, `load` accepts them.
        image.tile = []
        image.load()
        flags.add("truncated")
    orientation = _orientation(image, flags)
    if orientation == 1 and turned_by_pillow in range(2, 9):
        flags.add("exif_orientation")
    return _turn(_to_rgb(image, background, flags), orientation)


def _raw_mode(tile: Any) -> str:
    arguments = tile[3]
    return str(arguments[0] if isinstance(arguments, tuple | list) and arguments else arguments)


def _orientation(image: Image.Image, flags: set[str]) -> int:
    try:
        if image.info.get("exif"):
            Image.Exif().load(image.info["exif"])  # raises, where `getexif` may have kept silent
        orientation = image.getexif().get(0x0112, 1)
    except Exception:  # the parser raises whatever the bytes lead it to; the pixels are not affected
        flags.add("bad_exif")
        return 1
    if not isinstance(orientation, int) or not 2 <= orientation <= 8:
        return 1
    flags.add("exif_orientation")
    return orientation


def _turn(pixels: Tensor, orientation: int) -> Tensor:
    """Undo an EXIF orientation. 5 to 8 are stored with rows and columns exchanged."""
    if orientation == 1:
        return pixels
    if orientation >= 5:
        pixels = pixels.transpose(1, 2)
    horizontal, vertical = orientation in (2, 3, 6, 7), orientation in (3, 4, 7, 8)
    return pixels.flip([axis for axis, flip in ((1, vertical), (2, horizontal)) if flip])


def _to_rgb(image: Image.Image, background: tuple[int, int, int], flags: set[str]) -> Tensor:
    """Convert any Pillow mode to 3 x height x width, uint8, before anything is resized."""
    mode = image.mode
    if mode in ("P", "PA"):
        flags.add("palette")
    elif mode.startswith(("1", "L", "I", "F")) and mode != "LAB":
        flags.add("grayscale")
    elif mode == "CMYK":
        flags.add("cmyk")
    elif mode in ("YCbCr", "LAB", "HSV"):
        flags.add("colorspace")

    if mode == "La":
        image = image.convert("LA")
    transparent = image.info.get("transparency")
    if mode.startswith(("I", "F")):
        values = np.asarray(image)
        gray = Image.fromarray(_to_8_bit(values, image.format, flags))
        if isinstance(transparent, int):
            flags.add("alpha")
            gray.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
        image = gray
    elif isinstance(transparent, tuple) and "16bit" in flags:
        image = image.copy()
        # Pillow keeps the high byte of the pixels, but both bytes of the transparent colour.
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    if image.has_transparency_data:
        flags.add("alpha")
        canvas = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(canvas, image.convert("RGBA"))
    pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _to_8_bit(values: np.ndarray, image_format: str | None, flags: set[str]) -> np.ndarray:
    if values.dtype.kind == "f":
        flags.add("float")
        if not np.isfinite(values).all():
            raise ValueError("some pixels are not finite numbers")
        if values.min() >= 0 and values.max() <= 1:
            return np.rint(values * 255).astype(np.uint8)
    else:
        sixteen = values.dtype.itemsize == 2 or image_format in (None, "PNG", "PPM")
        if sixteen and values.min() >= 0 and values.max() <= 65535:
            flags.add("16bit")
            return _16_to_8_bit(values)
        flags.add("int32")
    low, high = float(values.min()), float(values.max())
    return np.rint((values.astype(np.float64) - low) * (255 / ((high - low) or 1))).astype(np.uint8)


def _16_to_8_bit(values: np.ndarray) -> np.ndarray:
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _array_to_rgb(array: np.ndarray | Tensor, background: tuple[int, int, int], flags: set[str]) -> Tensor:
    found = f"{tuple(array.shape)} of {array.dtype}"
    if isinstance(array, Tensor):
        wanted, fits = "3 x height x width", array.ndim == 3 and array.shape[0] == 3
        array = array.detach().cpu()
        values = (array.float() if array.dtype == torch.bfloat16 else array).numpy()
        values = values.transpose(1, 2, 0) if fits else values
    else:
        wanted, values = "height x width, or x 3, or x 4", array
        fits = values.ndim == 2 or (values.ndim == 3 and values.shape[2] in (3, 4))
    if not fits or 0 in values.shape or not (values.dtype.kind == "f" or values.dtype in ("u1", "u2")):
        raise InputError(f"an image must be {wanted}, uint8, uint16 or float in [0, 1], not {found}")
    if values.dtype.kind == "f":
        if not (values.min() >= 0 and values.max() <= 1):  # false for NaN, too
            raise InputError(f"float pixels must be in [0, 1]: {found} has others or NaN")
        values = np.rint(values.astype(np.float64) * 255).astype(np.uint8)
    elif values.dtype == np.uint16:
        flags.add("16bit")
        values = _16_to_8_bit(values)
    return _to_rgb(Image.fromarray(np.ascontiguousarray(values)), background, flags)


# --- Preprocessing

# Beyond this multiple of the target, only the part of the resized image that survives the crop is computed.
_WINDOW_FACTOR = 8


@dataclass(frozen=True)
class ImagePreprocessing:
    """From pixels to an encoder's input: resize, centre crop or pad, normalise.

    uint8 pixels follow the encoders' own Pillow pipelines (open_clip, timm) to one level of 255, rounding of
    sizes and crop offsets included; a Pillow that resizes columns before rows, as recent ones do where it is
    cheaper, differs by more in about one pixel of ten thousand. Float pixels in [0, 1] take the same steps
    differentiably: what the bicubic kernel overshoots is clipped to [0, 1], as Pillow does, while its
    gradient passes unchanged.

    Attributes:
        size: (height, width) of the encoder's input.
        resize: "shortest" resizes by the shorter side and crops the centre, "longest" by the longer side and
            pads with `fill`, "squash" ignores the aspect ratio.
        resize_to: side before the crop, where it is not `size`: the shorter side in pixels, or the (height,
            width) that "shortest" covers, "longest" fits into and "squash" becomes. None is `size`.
        interpolation: kernel, antialiased except for "nearest".
        mean: per channel, in [0, 1] units.
        std: per channel, in [0, 1] units.
        fill: what "longest" pads with, in [0, 255] units, one value or one per channel.

    Raises:
        InputError: a setting is out of range, or the pixels are not "*batch 3 h w" of uint8 or float.
    """

    size: tuple[int, int]
    resize: Literal["shortest", "squash", "longest"]
    resize_to: int | tuple[int, int] | None = None
    interpolation: Literal["bicubic", "bilinear", "nearest"] = "bicubic"
    mean: tuple[float, float, float] = field(kw_only=True)
    std: tuple[float, float, float] = field(kw_only=True)
    fill: float | tuple[float, float, float] = 0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():  # JSON has no tuples
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        target = self.size if self.resize_to is None else self.resize_to
        target = target if isinstance(target, tuple) else (target, target)
        if len(self.size) != 2 or min(self.size) < 1 or len(target) != 2 or min(target) < 1:
            raise InputError(f"size {self.size!r} and resize_to {self.resize_to!r} must be at least 1 pixel")
        if self.resize not in ("shortest", "squash", "longest"):
            raise InputError(f"resize must be shortest, squash or longest, not {self.resize!r}")
        if self.interpolation not in _KERNELS:
            raise InputError(f"interpolation must be among {[*_KERNELS]}, not {self.interpolation!r}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise InputError(f"mean {self.mean!r} and std {self.std!r} must have 3 values, std above 0")

    def __call__(
        self, pixels: UInt8[Tensor, "*batch 3 h w"] | Float[Tensor, "*batch 3 h w"]
    ) -> Float[Tensor, "*batch 3 height width"]:
        """Preprocess: uint8 in [0, 255] becomes float32, float in [0, 1] keeps its type and gradient."""
        is_uint8 = pixels.dtype == torch.uint8
        typed = is_uint8 or pixels.is_floating_point()
        if pixels.ndim < 3 or pixels.shape[-3] != 3 or 0 in pixels.shape or not typed:
            found = f"{tuple(pixels.shape)} of {pixels.dtype}"
            raise InputError(f"pixels must be (*batch, 3, height, width) of uint8 or float, not {found}")
        resized = self._resized(pixels)
        fill = torch.as_tensor(self.fill if self.resize == "longest" else 0, device=pixels.device).expand(3)
        cropped = _center_crop_or_pad(resized, self.size, fill if is_uint8 else fill / 255)
        unit = cropped.to(torch.float32) / 255 if is_uint8 else cropped
        mean, std = (unit.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return ((unit - mean) / std).contiguous()

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON types; `from_dict` takes them back."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> ImagePreprocessing:
        """The preprocessing that `to_dict` described.

        Raises:
            InputError: a setting is unknown, missing or out of range.
        """
        known = {entry.name for entry in fields(cls)}
        if not {"size", "resize", "mean", "std"} <= set(settings) <= known:
            raise InputError(f"preprocessing settings must be of {sorted(known)}, not {sorted(settings)}")
        return cls(**settings)

    def _resized_size(self, height: int, width: int) -> tuple[int, int]:
        """Size after the resize, before the crop, rounded as torchvision, open_clip and timm do."""
        target = self.resize_to or self.size
        if self.resize == "shortest" and (isinstance(target, int) or target[0] == target[1]):
            side = target if isinstance(target, int) else target[0]
            longer = int(side * max(height, width) / min(height, width))
            return (side, longer) if height <= width else (longer, side)
        target = (target, target) if isinstance(target, int) else target
        if self.resize == "squash":
            return target
        ratios = height / target[0], width / target[1]
        ratio = min(ratios) if self.resize == "shortest" else max(ratios)
        return max(1, round(height / ratio)), max(1, round(width / ratio))

    def _resized(self, pixels: Tensor) -> Tensor:
        from torchvision.transforms.v2.functional import InterpolationMode, resize

        size = self._resized_size(*pixels.shape[-2:])
        if tuple(pixels.shape[-2:]) == size:
            return pixels
        # Pillow's nearest is torch's "nearest-exact".
        mode = InterpolationMode("nearest-exact" if self.interpolation == "nearest" else self.interpolation)
        windows = [want > _WINDOW_FACTOR * kept for want, kept in zip(size, self.size, strict=True)]
        if pixels.dtype == torch.uint8 and not any(windows):
            return resize(pixels, list(size), interpolation=mode, antialias=True)
        centre: dict[int, Tensor] = {}
        for axis in (-1, -2):
            if windows[axis]:
                low, high, weights = _centre_weights(
                    pixels.shape[axis], size[axis], self.size[axis], self.interpolation
                )
                pixels, centre[axis] = pixels.narrow(axis, low, high - low), weights
        for axis in (-1, -2):  # along rows first, and clipped after each, as uint8 is
            if axis in centre:
                pixels = _weighted(pixels, axis, centre[axis])
            else:
                one_way = [*pixels.shape[-2:]]
                one_way[axis] = size[axis]
                pixels = resize(pixels, one_way, interpolation=mode, antialias=True)
            if pixels.dtype != torch.uint8 and self.interpolation == "bicubic":
                pixels = pixels + (pixels.clamp(0, 1) - pixels).detach()
        return pixels


def _center_crop_or_pad(pixels: Tensor, size: tuple[int, int], fill: Tensor) -> Tensor:
    source, target = [], []
    for have, want in zip(pixels.shape[-2:], size, strict=True):
        crop = round(max(have - want, 0) / 2)
        pad = max(want - have, 0) // 2
        source.append(slice(crop, crop + want))
        target.append(slice(pad, pad + min(have, want)))
    cropped = pixels[..., source[0], source[1]]
    if tuple(cropped.shape[-2:]) == tuple(size):
        return cropped
    canvas = fill.to(pixels.dtype)[:, None, None].expand(*pixels.shape[:-2], *size).clone()
    canvas[..., target[0], target[1]] = cropped
    return canvas


def _cubic(x: Tensor) -> Tensor:
    x = x.abs()
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


# Reach and weight of Pillow's resampling kernels, by distance in pixels of the coarser grid.
_KERNELS: dict[str, tuple[float, Callable[[Tensor], Tensor]]] = {
    "bicubic": (2.0, _cubic),
    "bilinear": (1.0, lambda x: (1 - x.abs()).clamp(min=0)),
    "nearest": (0.5, lambda x: ((x > -0.5) & (x <= 0.5)).to(x.dtype)),
}


def _centre_weights(length: int, resized: int, kept: int, interpolation: str) -> tuple[int, int, Tensor]:
    """For the `kept` central positions of an axis resized to `resized`: source window and its weights."""
    reach, kernel = _KERNELS[interpolation]
    scale = length / resized
    stretch = max(scale, 1.0) if interpolation != "nearest" else 1.0
    first = round((resized - kept) / 2)
    centres = (torch.arange(first, first + kept, dtype=torch.float64) + 0.5) * scale
    low = max(int(centres[0] - reach * stretch) - 1, 0)
    high = min(int(centres[-1] + reach * stretch) + 2, length)
    weights = kernel((torch.arange(low, high, dtype=torch.float64) + 0.5 - centres[:, None]) / stretch)
    return low, high, weights / weights.sum(dim=1, keepdim=True)


def _weighted(pixels: Tensor, axis: int, weights: Tensor) -> Tensor:
    is_uint8 = pixels.dtype == torch.uint8
    window = (pixels.float() if is_uint8 else pixels).movedim(axis, -1)
    result = (window @ weights.T.to(window)).movedim(-1, axis)
    return result.round().clamp(0, 255).to(torch.uint8) if is_uint8 else result
