"""The second stage of a search: its hits, put in another order by a model that looks at the images again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mmalign.errors import InputError
from mmalign.imaging import DecodeSettings

from .hits import Hit
from .query import Term

if TYPE_CHECKING:
    from mmalign.object_aware.reranking import Reranker

__all__ = ["reranked", "words_of"]


def words_of(terms: Sequence[Term] | None) -> str:
    """The one text of a query, which a re-ranker reads.

    Args:
        terms: of the query; `None` where it is a vector.

    Raises:
        InputError: the query is anything else than one text.
    """
    if terms is None:
        raise InputError("re-ranking reads words, and the query is a vector; give words, or leave rerank out")
    if len(terms) > 1:
        raise InputError(
            f"re-ranking reads one text, and the query has {len(terms)} terms; say all of it in one string, or leave "
            "rerank out"
        )
    (term,) = terms
    if term.kind != "text":
        raise InputError("re-ranking reads words, and the query is an image; give words, or leave rerank out")
    if term.weight < 0:
        raise InputError(f"re-ranking looks for {term.value!r}, and the query leads away from it; leave rerank out")
    return str(term.value)


def reranked(
    hits: Sequence[Hit], reranker: Reranker, text: str, *, decode: DecodeSettings, progress: bool = False
) -> list[Hit]:
    """The hits by descending score of a re-ranker; ties stay in their order.

    Those whose file is gone or cannot be read come last, as they were among themselves, with no `rerank_score`. Where
    a file is gone and another of equal content is there, that one is read.
    """
    places: list[int] = []
    files: list[Path] = []
    for place, hit in enumerate(hits):
        file = _file_of(hit)
        if file is not None:
            places.append(place)
            files.append(file)
    scored: list[Hit] = [replace(hit, rerank_score=None) for hit in hits]
    if files:
        scores = reranker.score(text, files, decode=decode, progress=progress)
        for place, score in zip(places, scores, strict=True):
            if not math.isnan(score):
                scored[place] = replace(hits[place], rerank_score=float(score))
    scored.sort(key=lambda hit: math.inf if hit.rerank_score is None else -hit.rerank_score)
    return [replace(hit, rank=rank) for rank, hit in enumerate(scored, 1)]


def _file_of(hit: Hit) -> Path | None:
    """Relative names are of files of which nobody said where they are."""
    return next((path for path in (hit.path, *hit.aliases) if path.is_absolute() and path.exists()), None)
