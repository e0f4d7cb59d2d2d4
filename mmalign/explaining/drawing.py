"""The picture of an explanation: the image beside its caption, words coloured, scores as bars."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError

if TYPE_CHECKING:
    from .explanation import Explanation

__all__ = ["check_picture", "draw_explanation", "printable"]


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
    """Write it as PNG."""
    import warnings

    from matplotlib import colormaps
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    from ..plotting import name_axes, new_figure, save_figure

    words = found.words
    bars = 0.19 * len(words) + 0.9  # inches, as all below
    width, left, gap, line = 10.0, 4.4, 0.25, 0.3
    largest = max((abs(word.score) for word in words), default=0.0) or 1.0
    shade, colours = Normalize(-1.5 * largest, 1.5 * largest), colormaps["RdBu"]  # pale enough for black letters
    figure, _ = new_figure(1, 1.0, width)
    figure.clear()
    figure.set_layout_engine("none")
    renderer = figure.canvas.get_renderer()

    def size(text: str, weight: str) -> float:
        item = figure.text(0, 0, text, fontsize=11, fontweight=weight, parse_math=False)
        extent = item.get_window_extent(renderer).width / figure.dpi
        item.remove()
        return float(extent)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that the font lacks become boxes
        placed, x, row, end = [], 0.0, 0, 0
        for word in words:
            text, spaced = printable(word.word), found.caption[end : word.start] != ""
            weight = "bold" if word.flagged else "normal"
            extent, end = size(text, weight) + 0.08, word.end
            x += 0.06 * spaced
            if x and x + extent > width - left - 2 * gap:
                x, row = 0.0, row + 1
            placed.append((text, word, weight, x, row, extent))
            x += extent
        block = (row + 1) * line
        height = max(block + bars + 0.8, 3.6)
        figure.set_size_inches(width, height)

        def axes(x: float, y: float, w: float, h: float) -> Any:
            return figure.add_axes((x / width, 1 - (y + h) / height, w / width, h / height))

        image = axes(gap, gap, left - 2 * gap, height - 2 * gap)
        image.imshow(np.asarray(found.picture))
        image.set_anchor("N")
        image.set_axis_off()
        caption = axes(left, gap, width - left - gap, block)
        caption.set(xlim=(0, width - left - gap), ylim=(block, 0))
        caption.set_axis_off()
        for text, word, weight, x, row, extent in placed:
            frame = {"edgecolor": "black", "linewidth": 1.4} if word.flagged else {"edgecolor": "none"}
            face = colours(shade(word.score))
            caption.add_patch(Rectangle((x, row * line + 0.03), extent, line - 0.06, facecolor=face, **frame))
            caption.text(
                x + 0.04, row * line + line / 2, text, fontsize=11, va="center", parse_math=False,
                fontweight=weight,
            )  # fmt: skip
        chart = axes(left + 1.5, block + 0.75, width - left - 1.5 - gap, bars - 0.6)
        drawn = chart.barh(
            range(len(words)), [word.score for word in words], color=[colours(shade(word.score)) for word in words],
            edgecolor="0.5", linewidth=0.5,
        )  # fmt: skip
        for bar, word in zip(drawn, words, strict=True):
            if word.flagged:
                bar.set(hatch="////", edgecolor="black", linewidth=1.2)
        names = [f"[{text}]" if word.flagged else text for text, word, *_ in placed]
        chart.set_yticks(range(len(words)), [n if len(n) <= 22 else f"{n[:20]}…" for n in names], parse_math=False)
        chart.set_ylim(len(words) - 0.4, -0.6)
        chart.axvline(0, color="0.3", linewidth=0.8)
        if found.mode == "threshold":
            chart.axvline(found.eps, color="black", linewidth=0.8, linestyle="--")
        title = f"cosine {found.cosine:.3f}   CLIPScore {found.clip_score:.3f}   F-CLIPScore {found.f_clip_score:.2e}"
        suspect = f"below eps {found.eps:.2g}" if found.mode == "threshold" else "the lowest word"
        name_axes(chart, title, f"score of the word; framed, hatched: {suspect}")
        chart.ticklabel_format(axis="x", style="sci", scilimits=(-2, 2))
        chart.tick_params(labelsize=8)
        save_figure(figure, path)
