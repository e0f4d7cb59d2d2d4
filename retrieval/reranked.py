"""The second stage of a search: its hits, put in another order by a model that looks at the images again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mmalign.errors import InputError, UnreadableImageError
from mmalign.imaging import DecodeSettings, read_file

from .hits import Hit
from .items import Item, Items
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
    hits: Sequence[Hit], reranker: Reranker, text: str, *, items: Items, decode: DecodeSettings, progress: bool = False
) -> list[Hit]:
    """The hits by descending score of a re-ranker; ties stay in their order.

    Those whose file is gone, is not what was indexed any more, or cannot be read come last, as they were among
    themselves, with no `rerank_score`. Where another file of the hit is as it was indexed, that one is read.

    Args:
        hits: of the first stage.
        reranker: reads their files.
        text: what it compares them with.
        items: that the hits are of.
        decode: how files become pixels.
        progress: show a bar.
    """
    places: list[int] = []
    files: list[Path] = []
    for place, hit in enumerate(hits):
        file = _file_of(hit, items)
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


def _file_of(hit: Hit, items: Items) -> Path | None:
    """The first file of a hit that is as it was indexed.

    Relative names are of files of which nobody said where they are. A file of another time, as a folder that was copied
    has, may hold what it held: of such the content is compared.
    """
    paths = {hit.path, *hit.aliases}  # not all of the row's, where a filter held
    found = [item for item in map(items.item, items.positions_of_row(hit.item.row)) if item.path in paths]
    return next((item.path for item in found if item.path.is_absolute() and _holds_what_it_held(item)), None)


def _holds_what_it_held(item: Item) -> bool:
    if item.as_indexed:
        return True
    try:
        return item.path.stat().st_size == item.size and read_file(item.path).sha256 == item.sha256
    except (OSError, UnreadableImageError):
        return False
