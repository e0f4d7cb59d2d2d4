"""Every kind of bad or odd image file that came to mind, each with what must become of it.

The expected pixels are those the file was made from, never those that the reader gave before.
"""

from __future__ import annotations

import io
import os
import socket
import struct
import sys
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from mmalign import imaging
from mmalign.errors import InputError, UnreadableImageError
from mmalign.imaging import FLAGS, REASONS, DecodedImage, read_file, read_image

# Six flat blocks, different in every corner: survives lossy codecs, shows every flip and exchange of channels.
COLOURS = np.array([[250, 10, 10], [10, 250, 10], [10, 10, 250], [250, 250, 10], [0, 0, 0], [255, 255, 255]])
BLOCKS = np.kron(COLOURS.reshape(2, 3, 3), np.ones((16, 16, 1))).astype(np.uint8)
GRAY = np.kron(np.array([[0, 60, 120], [180, 255, 30]]), np.ones((16, 16))).astype(np.uint8)
NOISE = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
GRADIENT = np.stack([np.add.outer(np.arange(64) * 2, np.arange(96)) % 256] * 3, axis=2).astype(np.uint8)


def encode(image: Image.Image | np.ndarray, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, image_format, **options)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of raw rows, for what Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    stride = len(rows) // height
    lines = b"".join(b"\0" + rows[i * stride : (i + 1) * stride] for i in range(height))
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    middle = b"".join(chunk(*extra) for extra in chunks)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + middle
    return start + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def jpeg(array: np.ndarray = BLOCKS, **options: object) -> bytes:
    return encode(array, "JPEG", **{"quality": 100, "subsampling": 0, **options})


def with_exif(data: bytes, exif: bytes) -> bytes:
    """The JPEG with `exif` put in as its metadata segment."""
    segment = b"Exif\0\0" + exif
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + data[2:]


def orientation_exif(value: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif.tobytes().removeprefix(b"Exif\0\0")


def resized_header(data: bytes, height: int, width: int | None = None) -> bytes:
    """The JPEG with another size in its frame header."""
    at = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
    stored = data[at + 7 : at + 9] if width is None else struct.pack(">H", width)
    return data[: at + 5] + struct.pack(">H", height) + stored + data[at + 9 :]


def tolerance(decoded: DecodedImage, expected: np.ndarray) -> int:
    reference = expected if expected.ndim == 3 else np.repeat(expected[..., None], 3, axis=2)
    assert tuple(decoded.pixels.shape) == (3, *reference.shape[:2])
    assert decoded.pixels.dtype == torch.uint8
    return int((decoded.pixels.permute(1, 2, 0).int() - torch.from_numpy(reference.astype(np.int32))).abs().max())


# --- Files that must be refused


def bomb_gif() -> bytes:
    return b"GIF89a" + struct.pack("<HH", 65535, 65535) + b"\x80\0\0" + b"\0\0\0\xff\xff\xff" + (
        b"," + struct.pack("<HHHH", 0, 0, 65535, 65535) + b"\0\x02\x02\x44\x01\0;"
    )  # fmt: skip


def huge_bmp() -> bytes:
    data = bytearray(encode(BLOCKS, "BMP"))
    data[18:26] = struct.pack("<ii", 2**30, 2**30)
    return bytes(data)


def flipped_idat(position: float) -> bytes:
    data = bytearray(encode(NOISE, "PNG"))
    start, end = data.find(b"IDAT") + 6, len(data) - 16
    data[start + int(position * (end - start - 1))] ^= 1
    return bytes(data)


def nan_tiff(value: float) -> bytes:
    array = np.zeros((8, 8), np.float32)
    array[3, 3] = value
    return encode(array, "TIFF")


def cut_scan(share: float, **options: object) -> bytes:
    data = jpeg(NOISE, **options)
    return data[: int(len(data) * share)]


def corrupt_tiff() -> bytes:
    data = bytearray(encode(NOISE, "TIFF", compression="tiff_lzw"))
    data[3000:6000] = b"\xff" * 3000
    return bytes(data)


SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9" height="9"/></svg>'
PDF = b"%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\ntrailer<</Root 1 0 R>>\n%%EOF\n"
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"

REFUSED: dict[str, tuple[str, Callable[[], bytes]]] = {
    "0 bytes": ("empty", lambda: b""),
    "1 byte": ("not_an_image", lambda: b"\xff"),
    "text": ("not_an_image", lambda: b"a red car beside a house\n" * 9),
    "text that begins like a BMP": ("not_an_image", lambda: b"BMW, red, beside a house\n" * 9),
    "zeros": ("not_an_image", lambda: bytes(50_000)),
    "ones": ("not_an_image", lambda: b"\xff" * 50_000),
    "random bytes": ("not_an_image", lambda: NOISE.tobytes()),
    "html": ("not_an_image", lambda: b"<!DOCTYPE html><html><body>404 Not Found</body></html>"),
    "json": ("not_an_image", lambda: b'{"error": "not found"}'),
    "svg": ("not_an_image", lambda: SVG),
    "pdf": ("not_an_image", lambda: PDF),
    "zip": ("not_an_image", lambda: b"PK\x03\x04" + bytes(100)),
    "mp4": ("not_an_image", lambda: struct.pack(">I", 24) + b"ftypisom" + bytes(100)),
    "postscript": ("unsupported", lambda: EPS),
    "hdf5": ("unsupported", lambda: b"\x89HDF\r\n\x1a\n" + bytes(100)),
    "psd signature and junk": ("corrupt", lambda: b"8BPS" + b"\x07" * 500),
    "jpeg of its first 3 bytes": ("truncated", lambda: jpeg()[:3]),
    "jpeg cut in its tables": ("truncated", lambda: jpeg()[:100]),
    "jpeg of headers only": ("truncated", lambda: jpeg()[: jpeg().find(b"\xff\xda") + 14]),
    "jpeg cut after 30%": ("truncated", lambda: cut_scan(0.3)),
    "jpeg cut after 90%": ("truncated", lambda: cut_scan(0.9)),
    "jpeg without its last byte": ("truncated", lambda: jpeg()[:-1]),
    "jpeg cut, progressive": ("truncated", lambda: cut_scan(0.5, progressive=True)),
    "jpeg cut, grayscale": ("truncated", lambda: jpeg(NOISE[..., 0].copy())[:-500]),
    "jpeg cut, cmyk": ("truncated", lambda: encode(Image.fromarray(NOISE).convert("CMYK"), "JPEG")[:-500]),
    "jpeg cut, with a thumbnail": ("truncated", lambda: with_exif(jpeg(NOISE), jpeg())[:-500]),
    "jpeg cut, end marker put back": ("truncated", lambda: cut_scan(0.6) + b"\xff\xd9"),
    "jpeg cut, padded with zeros, end marker": ("truncated", lambda: cut_scan(0.6)[:-1] + b"\xff\xd9" + bytes(99)),
    "jpeg cut at a restart marker, end marker put back": (
        "truncated",
        lambda: (d := jpeg(NOISE, restart_marker_rows=1))[: d.find(b"\xff\xd3")] + b"\xff\xd9",
    ),
    "jpeg that declares twice its height": ("truncated", lambda: resized_header(jpeg(NOISE), 128)),
    "jpeg that declares twice its height, progressive": (
        "truncated",
        lambda: resized_header(jpeg(NOISE, progressive=True), 128),
    ),
    "jpeg that declares 0 rows": ("corrupt", lambda: resized_header(jpeg(), 0)),
    "jpeg that declares 65500 x 65500": ("too_large", lambda: resized_header(jpeg(), 65500, 65500)),
    "jpeg without tables": ("corrupt", lambda: (d := jpeg()).replace(d[20:160], b"", 1)),
    "png cut in its header": ("truncated", lambda: encode(NOISE, "PNG")[:20]),
    "png cut after 30%": ("truncated", lambda: (d := encode(NOISE, "PNG"))[: len(d) // 3]),
    "png cut after 99%": ("truncated", lambda: encode(NOISE, "PNG")[:-60]),
    "png without its last chunk": ("truncated", lambda: encode(NOISE, "PNG")[:-12]),
    "png, bit flipped at the start of its data": ("corrupt", lambda: flipped_idat(0)),
    "png, bit flipped in the middle": ("corrupt", lambda: flipped_idat(0.5)),
    "png, bit flipped at the end": ("corrupt", lambda: flipped_idat(1)),
    "png, wrong width": ("corrupt", lambda: encode(NOISE, "PNG").replace(b"\0\0\0\x60", b"\0\0\0\x50", 1)),
    "png, fewer rows than declared": ("truncated", lambda: png(8, 9, 8, 0, bytes(72)).replace(b"", b"", 1)[:-20]),
    "png bomb of 30000 x 30000": ("too_large", lambda: png(30_000, 30_000, 1, 0, bytes(30_000 * 3750))),
    "gif cut in its header": ("truncated", lambda: encode(NOISE, "GIF")[:30]),
    "gif cut after 50%": ("truncated", lambda: (d := encode(NOISE, "GIF"))[: len(d) // 2]),
    "gif bomb": ("too_large", bomb_gif),
    "webp cut after 50%": ("truncated", lambda: (d := encode(NOISE, "WEBP"))[: len(d) // 2]),
    "webp without its last bytes": ("truncated", lambda: encode(NOISE, "WEBP", lossless=True)[:-4]),
    "tiff cut after 50%": ("truncated", lambda: (d := encode(NOISE, "TIFF"))[: len(d) // 2]),
    "tiff cut, compressed": ("truncated", lambda: encode(NOISE, "TIFF", compression="tiff_lzw")[:9000]),
    "tiff, junk in its data": ("corrupt", corrupt_tiff),
    "tiff of its header": ("truncated", lambda: encode(NOISE, "TIFF")[:8]),
    "tiff of NaN": ("corrupt", lambda: nan_tiff(np.nan)),
    "tiff of infinity": ("corrupt", lambda: nan_tiff(-np.inf)),
    "bmp cut after 50%": ("truncated", lambda: (d := encode(NOISE, "BMP"))[: len(d) // 2]),
    "bmp of a huge declared size": ("too_large", huge_bmp),
    "jpeg 2000 cut after 50%": ("truncated", lambda: (d := encode(NOISE, "JPEG2000"))[: len(d) // 2]),
    "avif cut after 50%": ("truncated", lambda: (d := encode(NOISE, "AVIF"))[: len(d) // 2]),
    "ico signature and junk": ("corrupt", lambda: b"\0\0\1\0\1\0" + b"\x09" * 500),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reason, make = REFUSED[kind]
    data = make()
    path = tmp_path / "photo.jpg"
    path.write_bytes(data)
    if reason == "too_large":  # refused by the header, before anything is decoded
        monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    for source in (path, str(path), data):
        with pytest.raises(UnreadableImageError) as caught:
            read_image(source)
        assert caught.value.reason == reason
        assert reason in REASONS
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 600
        if source is not data:
            assert str(path) in str(caught.value)


def test_heic_cut() -> None:
    pytest.importorskip("pillow_heif")
    read_image(jpeg())  # registers the format
    data = encode(NOISE, "HEIF")
    with pytest.raises(UnreadableImageError) as caught:
        read_image(data[: len(data) // 2])
    assert caught.value.reason == "truncated"


# --- Odd files that must be read


def animated(image_format: str, **options: object) -> bytes:
    others = [Image.fromarray(255 - BLOCKS), Image.fromarray(BLOCKS[::-1].copy())]
    return encode(BLOCKS, image_format, save_all=True, append_images=others, duration=100, **options)


def palette_png(transparency: bytes | None = None) -> bytes:
    indices = np.kron(np.arange(6).reshape(2, 3), np.ones((16, 16))).astype(np.uint8)
    image = Image.fromarray(indices, "P")
    image.putpalette(COLOURS.astype(np.uint8).tobytes())
    return encode(image, "PNG", **({} if transparency is None else {"transparency": transparency}))


def with_alpha(array: np.ndarray, alpha: int = 0) -> Image.Image:
    """`array`, its left third covered by `alpha` only."""
    image = Image.fromarray(array)
    mask = np.full(array.shape[:2], 255, np.uint8)
    mask[:, :16] = alpha
    image.putalpha(Image.fromarray(mask))
    return image


def on_white(array: np.ndarray, alpha: int = 0) -> np.ndarray:
    """The same over a white background."""
    result = array.astype(float)
    result[:, :16] = result[:, :16] * alpha / 255 + 255 * (1 - alpha / 255)
    return np.rint(result).astype(np.uint8)


def replaced(array: np.ndarray, old: object, new: object) -> np.ndarray:
    result = array.copy()
    result[(array == old).all(axis=2) if array.ndim == 3 else array == old] = new
    return result


def cmyk_jpeg(adobe: bool) -> bytes:
    """Inverted, as Photoshop and Pillow write it, with the marker that says so or without.

    Browsers and Pillow read both alike: files without the marker are as good as always inverted, too.
    """
    ink = np.zeros((*BLOCKS.shape[:2], 4), np.uint8)
    ink[..., :3] = 255 - BLOCKS
    image = Image.fromarray(ink, "CMYK")
    data = encode(image, "JPEG", quality=100)
    assert b"Adobe" in data
    if adobe:
        return data
    at = data.find(b"\xff\xee")
    return data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]


def sixteen_bit(array: np.ndarray) -> bytes:
    return (array.astype(np.uint32) * 257).astype(">u2").tobytes()


def ramp(low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    values = np.linspace(low, high, 256, dtype=np.float64).reshape(16, 16)
    return values, np.arange(256).reshape(16, 16)


def mpo() -> bytes:
    second = Image.fromarray(255 - BLOCKS)
    return encode(BLOCKS, "MPO", save_all=True, append_images=[second], quality=100, subsampling=0)


def gray_corner() -> np.ndarray:
    """A photo whose last pixels are truly of the gray that decoders fill missing data with."""
    array = GRADIENT.copy()
    array[-32:, -32:] = 128
    return array


def strip(height: int, width: int) -> np.ndarray:
    return np.resize(np.arange(251, dtype=np.uint8), (height, width, 3))


RGBA16 = png(48, 32, 16, 6, sixteen_bit(np.concatenate([BLOCKS, np.full((32, 48, 1), 255)], axis=2)))
YELLOW = (250, 250, 10)
YELLOW16 = struct.pack(">HHH", *(value * 257 for value in YELLOW))
# Low bytes that differ from the high ones, which are all that Pillow keeps of the pixels.
OTHER_YELLOW16 = struct.pack(">HHH", *(value * 256 + 7 for value in YELLOW))

# kind: file, expected pixels, levels of tolerance, flags
READ: dict[str, tuple[Callable[[], bytes], np.ndarray, int, tuple[str, ...]]] = {
    "jpeg": (jpeg, BLOCKS, 4, ()),
    "jpeg, progressive": (lambda: jpeg(progressive=True), BLOCKS, 4, ()),
    "jpeg, restart markers": (lambda: jpeg(restart_marker_blocks=1), BLOCKS, 4, ()),
    "jpeg, grayscale": (lambda: jpeg(GRAY), GRAY, 4, ("grayscale",)),
    "jpeg, cmyk as Adobe writes it": (lambda: cmyk_jpeg(True), BLOCKS, 8, ("cmyk",)),
    "jpeg, cmyk without marker": (lambda: cmyk_jpeg(False), BLOCKS, 8, ("cmyk",)),
    "jpeg with garbage after its end": (lambda: jpeg() + b"garbage\xff\x00" * 99, BLOCKS, 4, ()),
    "jpeg with zeros after its end": (lambda: jpeg() + bytes(5000), BLOCKS, 4, ()),
    "jpeg with junk for EXIF": (lambda: with_exif(jpeg(), b"\x93" * 60), BLOCKS, 4, ("bad_exif",)),
    "jpeg with cut EXIF": (lambda: with_exif(jpeg(), orientation_exif(6)[:9]), BLOCKS, 4, ()),
    "jpeg with empty EXIF": (lambda: with_exif(jpeg(), b""), BLOCKS, 4, ()),
    "jpeg, EXIF orientation 9": (lambda: with_exif(jpeg(), orientation_exif(9)), BLOCKS, 4, ()),
    "jpeg, EXIF orientation 0": (lambda: with_exif(jpeg(), orientation_exif(0)), BLOCKS, 4, ()),
    "jpeg, upside down": (
        lambda: with_exif(jpeg(), orientation_exif(3)), BLOCKS[::-1, ::-1].copy(), 4, ("exif_orientation",),
    ),
    "jpeg that ends in mid-gray": (lambda: jpeg(gray_corner()), gray_corner(), 4, ()),
    "jpeg that is mid-gray": (
        lambda: jpeg(np.full((40, 40, 3), 128, np.uint8), progressive=True), np.full((40, 40), 128), 0, (),
    ),
    "jpeg that is mid-gray, with restart markers": (
        lambda: jpeg(np.full((40, 40), 128, np.uint8), restart_marker_blocks=2), np.full((40, 40), 128),
        0, ("grayscale",),
    ),
    "mpo": (mpo, BLOCKS, 4, ("first_frame",)),
    "png": (lambda: encode(NOISE, "PNG"), NOISE, 0, ()),
    "png, 1 bit": (lambda: encode(Image.fromarray(GRAY > 100), "PNG"), (GRAY > 100) * 255, 0, ("grayscale",)),
    "png, 1 bit with transparent black": (
        lambda: encode(Image.fromarray(GRAY > 100), "PNG", transparency=0),
        np.full(GRAY.shape, 255), 0, ("alpha", "grayscale"),
    ),
    "png, grayscale": (lambda: encode(GRAY, "PNG"), GRAY, 0, ("grayscale",)),
    "png, grayscale with tRNS": (
        lambda: encode(GRAY, "PNG", transparency=60), replaced(GRAY, 60, 255), 0, ("alpha", "grayscale"),
    ),
    "png, grayscale with alpha": (
        lambda: encode(with_alpha(GRAY, 51), "PNG"), on_white(GRAY, 51), 1, ("alpha", "grayscale"),
    ),
    "png, palette": (palette_png, BLOCKS, 0, ("palette",)),
    "png, palette with one transparent colour": (
        lambda: palette_png(bytes([255, 255, 0, 255])), replaced(BLOCKS, (10, 10, 250), 255),
        0, ("alpha", "palette"),
    ),
    "png, RGB with tRNS": (
        lambda: encode(BLOCKS, "PNG", transparency=YELLOW), replaced(BLOCKS, YELLOW, 255), 0, ("alpha",),
    ),
    "png, RGBA": (lambda: encode(with_alpha(BLOCKS), "PNG"), on_white(BLOCKS), 0, ("alpha",)),
    "png, RGBA half transparent": (
        lambda: encode(with_alpha(BLOCKS, 102), "PNG"), on_white(BLOCKS, 102), 1, ("alpha",),
    ),
    "png, 16 bit": (lambda: png(48, 32, 16, 0, sixteen_bit(GRAY)), GRAY, 0, ("grayscale", "16bit")),
    "png, 16 bit, dark": (
        lambda: png(16, 16, 16, 0, np.arange(256, dtype=">u2").tobytes()),
        (np.arange(256) > 128).astype(np.uint8).reshape(16, 16), 0, ("grayscale", "16bit"),
    ),
    "png, 16 bit with tRNS": (
        lambda: png(48, 32, 16, 0, sixteen_bit(GRAY), (b"tRNS", struct.pack(">H", 60 * 257))),
        replaced(GRAY, 60, 255), 0, ("alpha", "grayscale", "16bit"),
    ),
    "png, 16 bit RGB": (lambda: png(48, 32, 16, 2, sixteen_bit(BLOCKS)), BLOCKS, 0, ("16bit",)),
    "png, 16 bit RGB with tRNS": (
        lambda: png(
            48, 32, 16, 2, sixteen_bit(BLOCKS).replace(YELLOW16, OTHER_YELLOW16), (b"tRNS", OTHER_YELLOW16)
        ),
        replaced(BLOCKS, YELLOW, 255), 0, ("alpha", "16bit"),
    ),
    "png, 16 bit RGBA": (lambda: RGBA16, BLOCKS, 0, ("alpha", "16bit")),
    "png, animated": (lambda: animated("PNG"), BLOCKS, 0, ("first_frame",)),
    "png with garbage after its end": (lambda: encode(NOISE, "PNG") + b"garbage" * 99, NOISE, 0, ()),
    "pgm, 16 bit": (
        lambda: b"P5 48 32 65535\n" + sixteen_bit(GRAY), GRAY, 0, ("grayscale", "16bit"),
    ),
    "gif": (lambda: encode(BLOCKS, "GIF"), BLOCKS, 0, ("palette",)),
    "gif, animated": (lambda: animated("GIF"), BLOCKS, 0, ("palette", "first_frame")),
    "gif, animated, cut in a later frame": (
        lambda: animated("GIF")[:-20], BLOCKS, 0, ("palette", "first_frame"),
    ),
    "webp, lossless": (lambda: encode(BLOCKS, "WEBP", lossless=True), BLOCKS, 0, ()),
    "webp, transparent": (
        lambda: encode(with_alpha(BLOCKS), "WEBP", lossless=True, exact=True), on_white(BLOCKS), 0, ("alpha",),
    ),
    "webp, animated": (lambda: animated("WEBP", lossless=True), BLOCKS, 0, ("first_frame",)),
    "tiff": (lambda: encode(NOISE, "TIFF", compression="tiff_adobe_deflate"), NOISE, 0, ()),
    "tiff, several pages": (lambda: animated("TIFF"), BLOCKS, 0, ("first_frame",)),
    "tiff, 16 bit": (
        lambda: encode(GRAY.astype(np.uint16) * 257, "TIFF"), GRAY, 0, ("grayscale", "16bit"),
    ),
    "tiff, 16 bit, big endian": (
        lambda: encode(Image.frombytes("I;16B", (48, 32), sixteen_bit(GRAY)), "TIFF"), GRAY, 0, ("grayscale", "16bit"),
    ),
    "tiff, 32 bit integers": (
        lambda: encode(GRAY.astype(np.int32) * 100_000, "TIFF"), GRAY, 0, ("grayscale", "int32"),
    ),
    "tiff, float in [0, 1]": (
        lambda: encode((GRAY / 255).astype(np.float32), "TIFF"), GRAY, 0, ("grayscale", "float"),
    ),
    "tiff, float in [0, 0.5]": (
        lambda: encode((GRAY / 510).astype(np.float32), "TIFF"), np.rint(GRAY / 2.0), 1, ("grayscale", "float"),
    ),
    "tiff, float in [-1000, 5000]": (
        lambda: encode(ramp(-1000, 5000)[0].astype(np.float32), "TIFF"), ramp(0, 1)[1], 0, ("grayscale", "float"),
    ),
    "tiff, float, constant": (
        lambda: encode(np.full((8, 8), 7, np.float32), "TIFF"), np.zeros((8, 8)), 0, ("grayscale", "float"),
    ),
    "tiff, cmyk": (
        lambda: encode(Image.fromarray(np.dstack([255 - BLOCKS, 0 * GRAY]), "CMYK"), "TIFF"), BLOCKS, 0, ("cmyk",),
    ),
    "tiff, YCbCr": (
        lambda: encode(Image.fromarray(BLOCKS).convert("YCbCr"), "TIFF"), BLOCKS, 3, ("colorspace",),
    ),
    "tiff, LAB": (
        lambda: encode(Image.fromarray(np.dstack([GRAY, 0 * GRAY, 0 * GRAY]), "LAB"), "TIFF"),
        np.array([[0, 0x38, 0x71], [0xAD, 255, 0x1C]]).repeat(16, 0).repeat(16, 1), 6, ("colorspace",),
    ),
    "bmp": (lambda: encode(NOISE, "BMP"), NOISE, 0, ()),
    "ico": (lambda: encode(Image.fromarray(NOISE[:32, :32]), "ICO", sizes=[(32, 32)]), NOISE[:32, :32], 0, None),
    "icns": (lambda: encode(Image.fromarray(np.tile(NOISE, (2, 2, 1))[:128, :128]), "ICNS"), np.empty(0), 0, None),
    "jpeg 2000": (lambda: encode(NOISE, "JPEG2000"), NOISE, 0, ()),
    "avif": (lambda: encode(BLOCKS, "AVIF", quality=100, subsampling="4:4:4"), BLOCKS, 8, ()),
    "1 x 1": (lambda: encode(np.full((1, 1, 3), 77, np.uint8), "PNG"), np.full((1, 1), 77), 0, ()),
    "4000 x 8": (lambda: encode(strip(8, 4000), "PNG"), strip(8, 4000), 0, ("extreme_aspect",)),
    "1 x 4000": (lambda: encode(strip(4000, 1), "PNG"), strip(4000, 1), 0, ("extreme_aspect",)),
}  # fmt: skip


@pytest.mark.parametrize("kind", READ)
def test_read(kind: str, tmp_path: Path) -> None:
    make, expected, levels, flags = READ[kind]
    path = tmp_path / "photo.jpg"  # the content decides, whatever the suffix says
    path.write_bytes(make())
    decoded = read_image(path)
    if kind == "icns":  # the largest of several sizes
        assert decoded.width == decoded.height >= 128
        return
    assert tolerance(decoded, expected) <= levels
    assert set(decoded.flags) <= set(FLAGS)
    if flags is not None:
        assert sorted(decoded.flags) == sorted(flags)


def test_heic() -> None:
    pytest.importorskip("pillow_heif")
    read_image(jpeg())  # registers the format
    decoded = read_image(encode(BLOCKS, "HEIF", quality=100, chroma=444))
    assert tolerance(decoded, BLOCKS) <= 12
    assert decoded.format == "HEIF"


def test_heic_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    read_image(jpeg())
    monkeypatch.setattr(imaging.identifying, "_plugin_formats", ())
    monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name not in ("HEIF", "AVIF")])
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    for brand in (b"heic", b"mif1", b"avif"):
        with pytest.raises(UnreadableImageError, match=r"mmalign\[heif\]") as caught:
            read_image(struct.pack(">I", 24) + b"ftyp" + brand + bytes(100))
        assert caught.value.reason == "unsupported"


@pytest.mark.parametrize("alpha", [0, 128])
def test_transparency_shows_the_background(alpha: int) -> None:
    data = encode(with_alpha(BLOCKS, alpha), "PNG")
    background = (10, 200, 30)
    expected = BLOCKS.astype(float)
    expected[:, :16] = expected[:, :16] * alpha / 255 + np.array(background) * (1 - alpha / 255)
    assert tolerance(read_image(data, background=background), np.rint(expected)) <= 1


@pytest.mark.parametrize("mode", ["RGBa", "La", "PA", "RGBX", "HSV", "I", "I;16"])
def test_pillow_modes_without_a_file_format(mode: str) -> None:
    if mode == "RGBa":
        image, expected = with_alpha(BLOCKS).convert("RGBa"), on_white(BLOCKS)
    elif mode == "La":
        image, expected = with_alpha(GRAY).convert("La"), on_white(GRAY)
    elif mode == "PA":
        image = Image.open(io.BytesIO(palette_png())).convert("PA")
        expected = BLOCKS
    elif mode in ("I", "I;16"):
        image = Image.fromarray(GRAY.astype(np.int32 if mode == "I" else np.uint16) * 257)
        expected = GRAY
    else:
        image, expected = Image.fromarray(BLOCKS).convert(mode), BLOCKS
    assert image.mode == mode
    before = image.tobytes()
    assert tolerance(read_image(image), expected) <= (4 if mode == "HSV" else 0)
    assert image.tobytes() == before


def test_bad_pillow_images() -> None:
    with pytest.raises(UnreadableImageError) as caught:
        read_image(Image.open(io.BytesIO(encode(NOISE, "PNG")[:-200])))
    assert caught.value.reason == "truncated"
    with pytest.raises(UnreadableImageError) as caught:
        read_image(Image.fromarray(np.full((4, 4), np.nan, np.float32)))
    assert caught.value.reason == "corrupt"
    with pytest.raises(UnreadableImageError) as caught:
        read_image(Image.fromarray(NOISE), max_pixels=100)
    assert caught.value.reason == "too_large"


# --- Incomplete files, when they are wanted


@pytest.mark.parametrize("kind", ["JPEG", "JPEG with end marker", "JPEG with thumbnail", "PNG", "GIF", "BMP", "TIFF"])
def test_tolerated_truncation_keeps_the_rows_there_are(kind: str) -> None:
    name = kind.split()[0]
    array = NOISE if name in ("JPEG", "PNG", "BMP", "TIFF") else GRADIENT
    options = {"JPEG": {"quality": 95}, "GIF": {"interlace": False}}.get(name, {})
    whole = encode(array, name, **options)
    whole = with_exif(whole, jpeg()) if "thumbnail" in kind else whole
    data = whole[: int(len(whole) * 0.7)] + (b"\xff\xd9" if "marker" in kind else b"")
    with pytest.raises(UnreadableImageError):
        read_image(data)
    decoded = read_image(data, tolerate_truncation=True)
    assert "truncated" in decoded.flags
    reference = torch.from_numpy(np.array(Image.open(io.BytesIO(whole)).convert("RGB"))).permute(2, 0, 1)
    assert decoded.pixels.shape == reference.shape
    there = slice(-24, None) if name == "BMP" else slice(None, 24)  # BMP is stored from the bottom
    missing = slice(None, 8) if name == "BMP" else slice(-8, None)
    assert torch.equal(decoded.pixels[:, there], reference[:, there])
    assert decoded.pixels[:, missing].float().std(dim=(1, 2)).max() == 0
    assert "truncated" not in read_image(whole, tolerate_truncation=True).flags
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


@pytest.mark.parametrize(
    "make", [lambda: flipped_idat(0.5), corrupt_tiff, lambda: jpeg()[:50], lambda: bytes(99), lambda: b""]
)
def test_tolerated_truncation_does_not_tolerate_more(make: Callable[[], bytes]) -> None:
    with pytest.raises(UnreadableImageError):
        read_image(make(), tolerate_truncation=True)


# --- Paths


def refuses(path: str | os.PathLike[str], reason: str) -> str:
    for read in (read_file, read_image):
        with pytest.raises(UnreadableImageError) as caught:
            read(path)
        assert caught.value.reason == reason
        assert str(caught.value).isprintable()
    return str(caught.value)


def test_missing_files_and_links(tmp_path: Path) -> None:
    assert "gone.jpg" in refuses(tmp_path / "gone.jpg", "missing")
    broken, itself, good = tmp_path / "broken.jpg", tmp_path / "itself.jpg", tmp_path / "good.jpg"
    broken.symlink_to(tmp_path / "gone.jpg")
    itself.symlink_to(itself)
    (tmp_path / "photo.jpg").write_bytes(jpeg())
    good.symlink_to(tmp_path / "photo.jpg")
    refuses(broken, "missing")
    assert "link to itself" in refuses(itself, "unreadable")
    refuses(tmp_path / "photo.jpg" / "inner.jpg", "missing")
    refuses("null\0character.jpg", "unreadable")
    assert tolerance(read_image(good), BLOCKS) <= 4


@pytest.mark.timeout(20)
def test_what_is_no_regular_file_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, fifo, sock = tmp_path / "folder.jpg", tmp_path / "fifo.jpg", tmp_path / "s.jpg"
    folder.mkdir()
    os.mkfifo(fifo)
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("s.jpg")
        monkeypatch.setattr(os, "open", lambda *args, **kwargs: pytest.fail("opened"))
        for path in (folder, fifo, sock, Path("/dev/zero")):
            refuses(path, "not_a_file")


@pytest.mark.timeout(20)
def test_a_fifo_that_takes_a_files_place_does_not_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(jpeg())
    before = path.stat()
    path.unlink()
    os.mkfifo(path)
    monkeypatch.setattr(Path, "stat", lambda self, **_: before)  # it was a file when it was looked at
    with pytest.raises(UnreadableImageError) as caught:
        read_file(path)
    assert caught.value.reason in ("changed", "unreadable")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(jpeg())
    path.chmod(0)
    refuses(path, "permission")


def test_errors_of_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(jpeg())
    real = os.open
    for error, reason in (
        (PermissionError(13, "Permission denied"), "permission"),
        (OSError(5, "I/O\nerror"), "unreadable"),
    ):

        def failing(name: object, *args: object, error: OSError = error, **kwargs: object) -> int:
            if name == path:
                raise error
            return real(name, *args, **kwargs)  # type: ignore[call-overload]

        monkeypatch.setattr(os, "open", failing)
        refuses(path, reason)


@pytest.mark.parametrize(
    "name",
    [
        "new\nline.jpg",
        "tab\tand\x1b[31mcolour.jpg",
        b"latin-\xe9-\xff.jpg",
        "emoji-🐶.jpg",
        "x" * 246 + ".jpg",
        " .jpg",
    ],
    ids=["newline", "control", "invalid utf-8", "emoji", "250 characters", "blank"],
)
def test_names(name: str | bytes, tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(name)
    path.write_bytes(jpeg())
    assert tolerance(read_image(path), BLOCKS) <= 4
    assert tolerance(read_image(str(path)), BLOCKS) <= 4
    path.write_bytes(b"")
    message = refuses(path, "empty")
    message.encode()  # no surrogates: it can be printed and written
    path.write_bytes(b"nothing")
    with pytest.raises(UnreadableImageError) as caught:
        read_image(path)
    assert str(caught.value).isprintable()
    assert str(tmp_path) in str(caught.value)


def test_a_name_too_long_for_the_system(tmp_path: Path) -> None:
    refuses(tmp_path / ("x" * 300 + ".jpg"), "unreadable")


def grow_while_reading(path: Path, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """Append to the file between its reading and the look at its size, `times` times."""
    real, left = os.fstat, [times]

    def fstat(descriptor: int) -> os.stat_result:
        if left[0]:
            left[0] -= 1
            with path.open("ab") as file:
                file.write(b"x")
        return real(descriptor)

    monkeypatch.setattr(imaging.reading.os, "fstat", fstat)


def test_a_file_that_changed_once_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(jpeg())
    grow_while_reading(path, monkeypatch, 1)
    content = read_file(path)
    assert content.data == jpeg() + b"x"
    assert content.size == len(jpeg()) + 1


def test_a_file_that_keeps_changing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(jpeg())
    grow_while_reading(path, monkeypatch, 99)
    refuses(path, "changed")


def test_a_file_rewritten_with_the_same_size_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(b"a" * 100)
    real, clock = os.fstat, [1_000_000_000]

    def fstat(descriptor: int) -> os.stat_result:
        clock[0] += 1_000_000_000
        os.utime(path, ns=(clock[0], clock[0]))
        return real(descriptor)

    monkeypatch.setattr(imaging.reading.os, "fstat", fstat)
    refuses(path, "changed")


def test_a_file_too_large_to_read(tmp_path: Path) -> None:
    path = tmp_path / "film.jpg"
    with path.open("wb") as file:
        file.truncate(imaging.MAX_FILE_BYTES + 1)  # sparse: takes no space
    refuses(path, "too_large")


def test_not_enough_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: object) -> None:
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(UnreadableImageError) as caught:
        read_image(encode(BLOCKS, "BMP"))
    assert caught.value.reason == "too_large"


@pytest.mark.parametrize(
    "error", [ValueError("a\nb"), IndexError(), struct.error("x"), OverflowError(), SyntaxError("y")]
)
def test_whatever_a_decoder_raises_is_the_files_fault(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: object) -> None:
        raise error

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with pytest.raises(UnreadableImageError) as caught:
        read_image(encode(BLOCKS, "BMP"))
    assert caught.value.reason == "corrupt"
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("source", [None, 3.5, [b"x"]])
def test_what_is_no_image_source(source: object) -> None:
    with pytest.raises(InputError):
        read_image(source)  # type: ignore[arg-type]


def test_damage_anywhere_never_escapes_as_another_error() -> None:
    generator = np.random.default_rng(1)
    for name in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "JPEG2000", "PPM", "ICO", "TGA"):
        whole = np.frombuffer(encode(NOISE[:32, :32].copy(), name), np.uint8)
        for _ in range(40):
            data = whole.copy()
            places = generator.integers(0, len(data), generator.integers(1, 20))
            data[places] = generator.integers(0, 256, len(places))
            keep = int(generator.integers(1, len(data) + 1)) if generator.random() < 0.3 else len(data)
            for tolerate in (False, True):
                with suppress(UnreadableImageError):  # and nothing else
                    decoded = read_image(data[:keep].tobytes(), tolerate_truncation=tolerate, max_pixels=10**6)
                    assert decoded.pixels.ndim == 3


def test_icons_larger_than_they_say() -> None:
    data = bytearray(encode(np.tile(NOISE, (2, 2, 1))[:100, :100], "ICO", sizes=[(100, 100)]))
    data[6:8] = bytes([16, 16])
    with pytest.raises(UnreadableImageError) as caught:
        read_image(bytes(data), max_pixels=5000)
    assert caught.value.reason == "too_large"
    inner = encode(np.tile(NOISE, (5, 4, 1))[:300, :300], "PNG")
    entry = b"ic07" + struct.pack(">I", len(inner) + 8) + inner  # 128 x 128, by its type
    with pytest.raises(UnreadableImageError) as caught:
        read_image(b"icns" + struct.pack(">I", len(entry) + 8) + entry)
    assert caught.value.reason == "corrupt"
