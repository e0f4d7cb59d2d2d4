"""Images and text in one space: encoders, and how to align them.

Names below are imported when first used, so that `import mmalign` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .class_bridge import class_bridge
    from .encoders import Encoder, load_encoder, register_source
    from .errors import MMAlignError
    from .imaging import ImagePreprocessing, read_image

__all__ = [
    "Encoder",
    "ImagePreprocessing",
    "MMAlignError",
    "class_bridge",
    "load_encoder",
    "read_image",
    "register_source",
]

_HOME = {
    "Encoder": "encoders",
    "ImagePreprocessing": "imaging",
    "MMAlignError": "errors",
    "class_bridge": "class_bridge",
    "load_encoder": "encoders",
    "read_image": "imaging",
    "register_source": "encoders",
}

try:
    __version__ = version("mmalign")
except PackageNotFoundError:
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
