"""Folders of images that answer in images: FAISS indices built, searched, kept up to date.

Names below are imported when first used, so that `import retrieval` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from .evaluate import evaluate_captions, read_captions
    from .grid import draw_grid
    from .hits import Hit
    from .index import ImageIndex
    from .index_types import register_index_type
    from .interop import export_clip_retrieval, import_clip_retrieval
    from .items import Item
    from .merge import merge_indexes
    from .options import UpdateOptions
    from .query import Query, Term
    from .repair import diagnose, repair
    from .report import UpdateReport
    from .upgrading import IndexUpgrade, UpgradeReport

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "evaluate": ["evaluate_captions", "read_captions"],
        "grid": ["draw_grid"],
        "hits": ["Hit"],
        "index": ["ImageIndex"],
        "index_types": ["register_index_type"],
        "interop": ["export_clip_retrieval", "import_clip_retrieval"],
        "items": ["Item"],
        "merge": ["merge_indexes"],
        "options": ["UpdateOptions"],
        "query": ["Query", "Term"],
        "repair": ["diagnose", "repair"],
        "report": ["UpdateReport"],
        "upgrading.report": ["UpgradeReport"],
        "upgrading.upgrade": ["IndexUpgrade"],
    },
)
