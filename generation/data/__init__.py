"""Training data: preference pairs and captioned images, read from where they lie and checked before the first step.

`open_source` reads Parquet, a folder with `metadata.jsonl`, twin folders `winner/` and `loser/`, webdataset tars, or a
dataset of the `datasets` library; `check_data` decodes every image once and says by name which rows cannot be used, and
why.
"""

# ruff: noqa: F401 (`__all__` comes from lazy_loader)
from __future__ import annotations

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from .checking import CheckedData, CheckOptions, NothingUsableError, check_data
    from .rows import Example, ImageRef, Problem, Row
    from .sources import RowSource, open_source

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "checking": ["CheckOptions", "CheckedData", "NothingUsableError", "check_data"],
        "rows": ["Example", "ImageRef", "Problem", "Row"],
        "sources": ["RowSource", "open_source"],
    },
)
