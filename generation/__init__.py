"""Diffusers pipelines: loaded, sampled so that every image can be made again, and LoRAs applied in full or refused.

Names below are imported when first used, so that `import generation` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from .images import GeneratedImage, read_settings
    from .pipelines import load_pipeline
    from .sampling import generate, generate_each
    from .tiny import tiny_pipeline

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "images": ["GeneratedImage", "read_settings"],
        "pipelines": ["load_pipeline"],
        "sampling": ["generate", "generate_each"],
        "tiny": ["tiny_pipeline"],
    },
)
