"""A search result."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .items import Item

__all__ = ["Hit"]


@dataclass(frozen=True)
class Hit:
    """One result.

    Attributes:
        rank: from 1.
        score: cosine between query and image, in [-1, 1].
        match: in [0, 1], how far above chance the cosine is in this index (see `retrieval.calibration`); `None` for
            indexes of fewer than 8 images.
        item: the image file.
        aliases: further files with the same content.
        metadata: the user's columns.
        by_new: found by the vector of a new encoder, while the index's encoder is being replaced. Scores of such hits
            and of the others are no common scale then; matches are, and hits are in their right order.
        rerank_score: of the re-ranker, by which hits are in order then; `None` where none was asked, or where the
            image is gone, changed or unreadable.
    """

    rank: int
    score: float
    match: float | None
    item: Item
    aliases: tuple[Path, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)
    by_new: bool = False
    rerank_score: float | None = None

    @property
    def path(self) -> Path:
        """Where the image is."""
        return self.item.path

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe; a path that is no UTF-8 comes escaped in `name` and raw, surrogate-escaped, in `path`."""
        return {
            "rank": self.rank,
            "score": round(self.score, 6),
            "match": None if self.match is None else round(self.match, 4),
            "id": self.item.id,
            "path": os.fspath(self.item.path),
            "exists": self.item.exists,
            "name": self.item.name,
            "width": self.item.width,
            "height": self.item.height,
            "format": self.item.format,
            "flags": list(self.item.flags),
            "sha256": self.item.sha256,
            "aliases": [os.fspath(path) for path in self.aliases],
            "metadata": _json_safe(self.metadata),
            "by_new": self.by_new,
            "rerank_score": None if self.rerank_score is None else round(self.rerank_score, 6),
        }


def _json_safe(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _json_safe(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_safe(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)
