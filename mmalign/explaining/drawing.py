"""The picture of an explanation: the image beside its caption, words coloured, scores as bars."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..errors import InputError

if TYPE_CHECKING:
    from .explanation import ExplainedWord, Explanation

__all__ = ["check_picture", "draw_explanation", "printable"]

_WIDTH, _LEFT, _GAP, _LINE = 10.0, 4.4, 0.25, 0.3  # inches: of all, of the image, around it, and of a row of words
_LONGEST = 20  # letters of a word


def check_picture(path: Path) -> None:
    """Refuse a name under which `Explanation.draw` does not write, before anything is computed.

    Raises:
        InputError: it does not end in .png.
    """
    if path.suffix.lower() != ".png":
        raise InputError(f"picture {str(path)!r} does not end in .png; give a name that does")


def printable(text: str) -> str:
    """Without line breaks, and without what would steer a terminal."""
    return "".join(c if c.isprintable() else " " for c in text)


def draw_explanation(found: Explanation, path: Path) -> None:
    """Write it as PNG; long words are shortened."""
    import warnings

    from ..plotting import new_figure, save_figure

    figure, _ = new_figure(1, 1.0, _WIDTH)
    figure.clear()
    figure.set_layout_engine("none")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that the font lacks become boxes
        placed = _in_rows(found, figure)
        block = _LINE * (1 + max((one.row for one in placed), default=0))
        bars = 0.19 * len(placed) + 0.9
        height = max(block + bars + 0.8, 3.6)
        figure.set_size_inches(_WIDTH, height)

        def axes(x: float, y: float, w: float, h: float) -> Any:
            return figure.add_axes((x / _WIDTH, 1 - (y + h) / height, w / _WIDTH, h / height))

        image = axes(_GAP, _GAP, _LEFT - 2 * _GAP, height - 2 * _GAP)
        image.imshow(np.asarray(found.picture))
        image.set_anchor("N")
        image.set_axis_off()
        shade = _shade(found)
        _paint_caption(axes(_LEFT, _GAP, _WIDTH - _LEFT - _GAP, block), placed, shade)
        _paint_bars(axes(_LEFT + 1.5, block + 0.75, _WIDTH - _LEFT - 1.5 - _GAP, bars - 0.6), found, placed, shade)
        save_figure(figure, path)


class _Placed(NamedTuple):
    """A word as it is written, and where: left edge and width in inches, and its row."""

    text: str
    word: ExplainedWord
    x: float
    row: int
    extent: float

    @property
    def weight(self) -> str:
        return "bold" if self.word.flagged else "normal"


def _in_rows(found: Explanation, figure: Any) -> list[_Placed]:
    """The words of a caption, broken into rows."""
    renderer = figure.canvas.get_renderer()
    placed: list[_Placed] = []
    x, row, end = 0.0, 0, 0
    for word in found.words:
        text = printable(word.word)
        text = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 2]}…"
        one = _Placed(text, word, 0.0, 0, 0.0)
        item = figure.text(0, 0, text, fontsize=11, fontweight=one.weight, parse_math=False)
        extent = float(item.get_window_extent(renderer).width / figure.dpi) + 0.08
        item.remove()
        x += 0.06 * (found.caption[end : word.start] != "")
        if x and x + extent > _WIDTH - _LEFT - 2 * _GAP:
            x, row = 0.0, row + 1
        placed.append(one._replace(x=x, row=row, extent=extent))
        x, end = x + extent, word.end
    return placed


def _shade(found: Explanation) -> Callable[[float], Any]:
    """Colours of scores, red below 0 and blue above, pale enough for black letters."""
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    largest = max((abs(word.score) for word in found.words), default=0.0) or 1.0
    level, colours = Normalize(-1.5 * largest, 1.5 * largest), colormaps["RdBu"]
    return lambda score: colours(level(score))


def _paint_caption(axes: Any, placed: list[_Placed], shade: Callable[[float], Any]) -> None:
    from matplotlib.patches import Rectangle

    rows = 1 + max((one.row for one in placed), default=0)
    axes.set(xlim=(0, _WIDTH - _LEFT - _GAP), ylim=(rows * _LINE, 0))
    axes.set_axis_off()
    for one in placed:
        y, face = one.row * _LINE, shade(one.word.score)
        frame = {"edgecolor": "black", "linewidth": 1.4} if one.word.flagged else {"edgecolor": "none"}
        axes.add_patch(Rectangle((one.x, y + 0.03), one.extent, _LINE - 0.06, facecolor=face, **frame))
        axes.text(
            one.x + 0.04, y + _LINE / 2, one.text, fontsize=11, fontweight=one.weight, va="center", parse_math=False
        )


def _paint_bars(axes: Any, found: Explanation, placed: list[_Placed], shade: Callable[[float], Any]) -> None:
    from ..plotting import name_axes

    scores = [one.word.score for one in placed]
    bars = axes.barh(range(len(scores)), scores, color=[*map(shade, scores)], edgecolor="0.5", linewidth=0.5)
    for bar, one in zip(bars, placed, strict=True):
        if one.word.flagged:
            bar.set(hatch="////", edgecolor="black", linewidth=1.2)
    names = [f"[{one.text}]" if one.word.flagged else one.text for one in placed]
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.axvline(0, color="0.3", linewidth=0.8)
    suspect = "the lowest word"
    if found.mode == "threshold":
        axes.axvline(found.eps, color="black", linewidth=0.8, linestyle="--")
        suspect = f"below eps {found.eps:.2g}"
    title = f"cosine {found.cosine:.3f}   CLIPScore {found.clip_score:.3f}   F-CLIPScore {found.f_clip_score:.2e}"
    name_axes(axes, title, f"score of the word; framed, hatched: {suspect}")
    axes.ticklabel_format(axis="x", style="sci", scilimits=(-2, 2))
    axes.tick_params(labelsize=8)
