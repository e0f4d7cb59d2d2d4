"""Folders of images that answer in images: FAISS indices built, searched, kept up to date.

Names below are imported when first used, so that `import retrieval` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .build import UpdateReport
    from .grid import draw_grid
    from .hits import Hit
    from .index import ImageIndex
    from .interop import export_clip_retrieval, import_clip_retrieval
    from .items import Item
    from .merge import merge_indexes
    from .query import Term

__all__ = [
    "Hit",
    "ImageIndex",
    "Item",
    "Term",
    "UpdateReport",
    "draw_grid",
    "export_clip_retrieval",
    "import_clip_retrieval",
    "merge_indexes",
]

_HOME = {
    "Hit": "hits",
    "ImageIndex": "index",
    "Item": "items",
    "Term": "query",
    "UpdateReport": "build",
    "draw_grid": "grid",
    "export_clip_retrieval": "interop",
    "import_clip_retrieval": "interop",
    "merge_indexes": "merge",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return list(__all__)
