"""Folders of images that answer in images: FAISS indices built, searched, kept up to date.

Names below are imported when first used, so that `import retrieval` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from .build import UpdateReport
    from .grid import draw_grid
    from .hits import Hit
    from .index import ImageIndex
    from .interop import export_clip_retrieval, import_clip_retrieval
    from .items import Item
    from .merge import merge_indexes
    from .query import Term

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "build": ["UpdateReport"],
        "grid": ["draw_grid"],
        "hits": ["Hit"],
        "index": ["ImageIndex"],
        "interop": ["export_clip_retrieval", "import_clip_retrieval"],
        "items": ["Item"],
        "merge": ["merge_indexes"],
        "query": ["Term"],
    },
)
