"""Images and text in one space: encoders, and how to align them.

Names below are imported when first used, so that `import mmalign` costs nothing.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from .conse import class_bridge
    from .encoders import Encoder, JoinedEncoder, load_encoder, register_source
    from .errors import MMAlignError
    from .imaging import ImagePreprocessing, read_image

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "conse": ["class_bridge"],
        "encoders": ["Encoder", "JoinedEncoder", "load_encoder", "register_source"],
        "errors": ["MMAlignError"],
        "imaging": ["ImagePreprocessing", "read_image"],
    },
)

try:
    __version__ = version("mmalign")
except PackageNotFoundError:
    __version__ = "0+unknown"
