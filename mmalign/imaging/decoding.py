"""Data of a known format, or an array, to upright 8-bit RGB."""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFile
from torch import Tensor

from ..errors import InputError
from .identifying import DEFAULT_MAX_PIXELS, ends_early, jpeg_scan, open_header

__all__ = ["array_to_rgb", "decode_jpeg", "decode_with_pillow", "no_size_warning"]

_warnings_lock = threading.Lock()


@contextmanager
def no_size_warning(pixels: int) -> Iterator[None]:
    """Silence Pillow's warning of large images; one thread at a time, as warning filters are process-wide."""
    if pixels <= DEFAULT_MAX_PIXELS // 2:
        yield
        return
    with _warnings_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def decode_jpeg(
    header: Image.Image, data: bytes, fast_decode: tuple[int, int] | None, tolerate: bool, flags: set[str]
) -> Tensor:
    """torchvision's decoder for plain JPEGs, Pillow for the rest; upright RGB."""
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
    scan_end = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]").search(data, max(jpeg_scan(data), 0) + 2)
    if scan_end is None:
        return False
    filler = b"".join(bytes(range(255)) + bytes([0xFF, 0xD0 + i]) for i in range(8))  # also across restarts
    image = open_header(data[: scan_end.start()] + filler + data[scan_end.start() :], "")
    image.draft(image.mode, (pixels.shape[2], pixels.shape[1]))
    refilled = _to_rgb(image, (255, 255, 255), set())
    return refilled.shape == pixels.shape and bool((refilled.int() - pixels.int()).abs().max() > 32)


def decode_with_pillow(
    image: Image.Image, data: bytes, tolerate: bool, background: tuple[int, int, int], flags: set[str]
) -> Tensor:
    """Whatever Pillow reads, its first frame; upright RGB on `background`."""
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
        if not ends_early(error, data, image.format or ""):
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


def array_to_rgb(array: np.ndarray | Tensor, background: tuple[int, int, int], flags: set[str]) -> Tensor:
    """Arrays `h w`, `h w 3`, `h w 4` and tensors `3 h w` as RGB.

    Raises:
        InputError: another shape or type, or values that are not finite or not in [0, 1].
    """
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
