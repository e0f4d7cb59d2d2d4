"""Pictures side by side under headings, in one picture."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from ..checks import at_least
from ..errors import InputError, UnreadableImageError
from ..files import whole_file
from .reading import read_image

__all__ = ["draw_contact_sheet"]

_GAP, _HEADING, _LINE, _MOST_COLUMNS = 12, 40, 17, 8
_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

Picture = Image.Image | str | os.PathLike[str]
Caption = str | Sequence[str]


def draw_contact_sheet(
    rows: Sequence[tuple[str, Sequence[tuple[Picture, Caption]]]],
    path: str | os.PathLike[str],
    *,
    columns: int | None = None,
    cell: int = 224,
    empty: str = "nothing to show",
) -> Path:
    """Draw rows of captioned pictures and save them as one picture.

    A file that cannot be read leaves a gray cell. The picture appears under its name when it is complete.

    Args:
        rows: (heading, pictures) pairs; a picture is a Pillow image or the path of one, with a caption of one line or
            a sequence of lines, cut to the cell's width. A row takes as many lines as its pictures need.
        path: where to; the suffix says the format.
        columns: pictures a line; by default the most pictures of any row, at most 8.
        cell: side of a picture's square, in pixels.
        empty: what a row without pictures says.

    Raises:
        InputError: nothing to draw, `columns` or `cell` below 1, or the file cannot be written.
    """
    if not rows:
        raise InputError("there are no pictures to draw")
    at_least("columns", columns)
    at_least("cell", cell)
    if columns is None:
        columns = max(1, min(_MOST_COLUMNS, max(len(pictures) for _, pictures in rows)))
    blocks = [(heading, [(picture, _lines(caption)) for picture, caption in row]) for heading, row in rows]
    most_lines = max((len(lines) for _, pictures in blocks for _, lines in pictures), default=0)
    step = cell + 6 + _LINE * most_lines + _GAP
    heights = [-(-len(pictures) // columns) * step if pictures else _HEADING for _, pictures in blocks]
    canvas = Image.new("RGB", (columns * (cell + _GAP) + _GAP, sum(_HEADING + h for h in heights) + _GAP), "white")
    draw = ImageDraw.Draw(canvas)
    large, small = ImageFont.load_default(22), ImageFont.load_default(13)
    top = _GAP
    for (heading, pictures), height in zip(blocks, heights, strict=True):
        draw.text((_GAP, top + 4), _fit(draw, heading, large, canvas.width - 2 * _GAP), fill="black", font=large)
        top += _HEADING
        if not pictures:
            draw.text((_GAP, top), empty, fill="gray", font=small)
        for number, (picture, lines) in enumerate(pictures):
            left, upper = _GAP + (number % columns) * (cell + _GAP), top + (number // columns) * step
            canvas.paste(_thumbnail(picture, cell), (left, upper))
            for line, text in enumerate(lines):
                place = (left, upper + cell + 2 + line * _LINE)
                draw.text(place, _fit(draw, text, small, cell), fill="gray" if line else "black", font=small)
        top += height
    with whole_file(path, remedy="choose another place, with a name that ends in .png") as fresh:
        try:
            canvas.save(fresh)
        except ValueError as error:  # a suffix that Pillow does not know
            raise OSError(str(error)) from None
    return Path(path)


def _lines(caption: Caption) -> Sequence[str]:
    return (caption,) if isinstance(caption, str) else caption


def _thumbnail(picture: Picture, cell: int) -> Image.Image:
    try:
        pixels = read_image(picture).to_pil()
    except UnreadableImageError as error:
        blank = Image.new("RGB", (cell, cell), "gainsboro")
        reason = error.reason.replace("_", " ")
        ImageDraw.Draw(blank).text((8, cell // 2), reason, fill="gray", font=ImageFont.load_default(13))
        return blank
    return ImageOps.pad(pixels, (cell, cell), color="white")


def _fit(draw: ImageDraw.ImageDraw, text: str, font: _Font, width: int) -> str:
    text = re.sub(r"[^\S ]+", " ", text.strip())
    while draw.textlength(text, font) > width and len(text) > 1:
        text = text[:-2] + "…"
    return text
