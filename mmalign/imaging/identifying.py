"""What a file is, by its content, and whether its data are complete; before anything is decoded."""

from __future__ import annotations

import io
import threading
import zlib

from PIL import Image

from ..errors import UnreadableImageError, reason_of

__all__ = [
    "DEFAULT_MAX_PIXELS",
    "JPEG_END",
    "UNDECODABLE",
    "ends_early",
    "explain",
    "is_cut",
    "jpeg_scan",
    "open_header",
    "png_checksums_hold",
    "refusal",
]

# Twice Pillow's MAX_IMAGE_PIXELS, the size that Pillow itself refuses: 179 megapixels.
DEFAULT_MAX_PIXELS = 178_956_970
# Identified by Pillow, but not decoded at all, or only by starting another program on an untrusted file.
UNDECODABLE = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})
# Their signatures are long enough that a file which fails to parse is a damaged image, not something else.
_SIGNED = frozenset(("AVIF", "GIF", "HEIF", "ICNS", "ICO", "JPEG", "JPEG2000", "PNG", "PSD", "QOI", "TIFF", "WEBP"))
_HEIF_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1", b"avif", b"avis"})
JPEG_END = b"\xff\xd9"


def refusal(reason: str, name: str, detail: str) -> UnreadableImageError:
    """The error for a file, its name in front."""
    return UnreadableImageError(reason, f"{name}: {detail}")


_plugin_lock = threading.Lock()
_plugin_formats: tuple[str, ...] = ()


def formats() -> tuple[str, ...]:
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


def open_header(data: bytes, name: str) -> Image.Image:
    """`Image.open` without its check of the size, whose limit and warning are settings of the process."""
    failure: tuple[Exception, str] | None = None
    for image_format in formats():
        factory, accept = Image.OPEN[image_format]
        try:
            accepted = accept(data[:16]) if accept else True
            if isinstance(accepted, str):
                raise refusal("unsupported", name, accepted)
            if accepted:
                return factory(io.BytesIO(data), "")
        except UnreadableImageError:
            raise
        except Exception as error:
            if image_format in _SIGNED or isinstance(error, Image.DecompressionBombError):
                failure = failure or (error, image_format)
    if failure:
        raise explain(failure[0], data, failure[1], name)
    if data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS:
        raise refusal("unsupported", name, "HEIC and AVIF need `pip install mmalign[heif]`")
    raise refusal("not_an_image", name, "is not an image of a known format")


def is_cut(data: bytes, image_format: str) -> bool:
    """Whether the data end before what the format's own lengths and end markers announce."""
    if image_format in ("JPEG", "MPO", "JPEG2000"):  # end with the same marker
        return data.rfind(JPEG_END, max(jpeg_scan(data), 0)) < 0
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


def png_checksums_hold(data: bytes) -> bool:
    """Whether the pixel data of a PNG are what was written."""
    # Pillow skips the checksums of pixel data; some flipped bits would otherwise pass as another picture.
    view = memoryview(data)
    return all(
        zlib.crc32(view[start:end]) == int.from_bytes(view[end : end + 4], "big")
        for kind, start, end in _png_chunks(data)
        if kind[:1].isupper()
    )


def jpeg_scan(data: bytes) -> int:
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


def ends_early(error: Exception, data: bytes, image_format: str) -> bool:
    """Whether decoding failed for want of data, rather than because of what the data say."""
    announced = isinstance(error, EOFError) or "truncated" in str(error).lower()
    return announced or (bool(data) and is_cut(data, image_format))


def explain(error: Exception, data: bytes, image_format: str, name: str) -> UnreadableImageError:
    """A library's exception as an error with a reason."""
    text = reason_of(error)
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning | MemoryError):
        return refusal("too_large", name, f"{image_format}: {text}")
    if ends_early(error, data, image_format):
        return refusal("truncated", name, f"{image_format} data end before the image does ({text})")
    return refusal("corrupt", name, f"{image_format} data cannot be decoded ({text})")
