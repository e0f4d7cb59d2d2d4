"""The library's one reader of image files, and the preprocessing between its pixels and an encoder.

A file is read once (`read_file`), identified by its header, checked, and only then decoded (`read_image`).
What is wrong with it becomes an `UnreadableImageError` with a reason from `REASONS`; what is out of the
ordinary but readable is decoded and named in `DecodedImage.flags`. `ImagePreprocessing` takes the pixels to
an encoder's input: uint8 as the encoder's authors do with Pillow, float differentiably.
"""

from .preprocessing import ImagePreprocessing
from .reading import (
    DEFAULT_DECODING,
    DEFAULT_MAX_PIXELS,
    FLAGS,
    MAX_FILE_BYTES,
    REASONS,
    DecodedImage,
    DecodeSettings,
    FileContent,
    read_file,
    read_image,
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
    "ImagePreprocessing",
    "read_file",
    "read_image",
]
