"""Results that can be looked at: a picture with a row of hits for each query."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from mmalign.errors import InputError, UnreadableImageError
from mmalign.imaging import read_image

from .hits import Hit

__all__ = ["draw_grid"]

_CELL, _GAP, _CAPTION = 224, 12, 40


def draw_grid(
    results: Sequence[tuple[str, Sequence[Hit]]], path: str | os.PathLike[str], *, columns: int | None = None
) -> Path:
    """Draw hits under the query that found them and save the picture.

    Args:
        results: (query, hits) pairs; a query takes as many lines as its hits need.
        path: where to; the suffix says the format.
        columns: hits a line; by default the most hits of any query, at most 8.

    Raises:
        InputError: nothing to draw, or the file cannot be written.
    """
    if not results:
        raise InputError("there are no results to draw")
    columns = columns or max(1, min(8, max(len(hits) for _, hits in results)))
    step = _CELL + _CAPTION + _GAP
    heights = [-(-len(hits) // columns) * step if hits else _CAPTION for _, hits in results]
    size = (columns * (_CELL + _GAP) + _GAP, sum(_CAPTION + height for height in heights) + _GAP)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    heading, small = ImageFont.load_default(22), ImageFont.load_default(13)
    top = _GAP
    for (query, hits), height in zip(results, heights, strict=True):
        draw.text((_GAP, top + 4), _fit(draw, query, heading, size[0] - 2 * _GAP), fill="black", font=heading)
        top += _CAPTION
        if not hits:
            draw.text((_GAP, top), "nothing here matches", fill="gray", font=small)
        for number, hit in enumerate(hits):
            left = _GAP + (number % columns) * (_CELL + _GAP)
            upper = top + (number // columns) * step
            canvas.paste(_thumbnail(hit), (left, upper))
            match = "" if hit.match is None else f"  match {hit.match:.2f}"
            draw.text((left, upper + _CELL + 2), f"{hit.rank}  cosine {hit.score:.3f}{match}", fill="black", font=small)
            name = _fit(draw, hit.item.name, small, _CELL)
            draw.text((left, upper + _CELL + 19), name, fill="gray", font=small)
        top += height
    target = Path(path)
    try:
        canvas.save(target)
    except (OSError, ValueError) as error:
        raise InputError(
            f"the picture cannot be written to {str(target)!r} ({error}); try a path that ends in .png"
        ) from None
    return target


def _thumbnail(hit: Hit) -> Image.Image:
    try:
        picture = read_image(hit.path).to_pil()
    except UnreadableImageError:
        blank = Image.new("RGB", (_CELL, _CELL), "gainsboro")
        ImageDraw.Draw(blank).text((8, _CELL // 2), "file is gone", fill="gray", font=ImageFont.load_default(13))
        return blank
    return ImageOps.pad(picture, (_CELL, _CELL), color="white")


def _fit(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    text = " ".join(text.split())
    while draw.textlength(text, font) > width and len(text) > 1:
        text = text[:-2] + "…"
    return text
