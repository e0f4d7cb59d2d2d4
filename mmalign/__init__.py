"""Images and text in one space: encoders, and how to align them.

Names below are imported when first used, so that `import mmalign` costs nothing.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from . import metrics
    from .conse import class_bridge
    from .encoders import DEFAULT_SPEC, Encoder, JoinedEncoder, load_encoder, register_source
    from .errors import InputError, MMAlignError
    from .imaging import ImagePreprocessing, read_image

__getattr__, __dir__, _names = lazy_loader.attach(
    __name__,
    submodules=["metrics"],
    submod_attrs={
        "conse": ["class_bridge"],
        "encoders": ["DEFAULT_SPEC", "Encoder", "JoinedEncoder", "load_encoder", "register_source"],
        "errors": ["InputError", "MMAlignError"],
        "imaging": ["ImagePreprocessing", "read_image"],
    },
)

try:
    __version__ = version("mmalign")
except PackageNotFoundError:
    __version__ = "0+unknown"

__all__ = [*_names, "__version__"]
