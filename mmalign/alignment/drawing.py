"""Pictures of an alignment: what it finds and names beside its baselines, how it was fitted, and layer scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..evaluation import Comparison, ZeroShot
from ..plotting import name_axes, name_rows, new_figure, save_figure, share_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_layers", "draw_report", "draw_zero_shot", "score_title"]

_TITLES = {"text_to_image": "text to image", "image_to_text": "image to text"}


def draw_report(path: Path, comparison: Comparison, history: Sequence[Mapping[str, float]] = ()) -> None:
    """R@k of every candidate with 95 % intervals, both directions; and the way of the fit where there is one."""
    figure, axes = new_figure(2 + bool(history), max(3.0, 1.4 + 0.42 * len(comparison.figures)))
    for axis, (direction, title) in zip(axes, _TITLES.items(), strict=False):
        _recalls(axis, comparison, direction)
        name_axes(axis, f"{title}  ({comparison.images:,} images, {comparison.captions:,} captions)")
    name_rows(axes[0], comparison.figures)
    axes[1].set_yticks(range(len(comparison.figures)), [""] * len(comparison.figures))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=9, fontsize=8, frameon=False)
    if history:
        _fit(axes[2], history)
    save_figure(figure, path)


def draw_zero_shot(path: Path, result: ZeroShot) -> None:
    """Top-1 and top-5 accuracy over the images of every candidate."""
    figure, (axis,) = new_figure(1, max(3.0, 1.4 + 0.42 * len(result.figures)), 6.0)
    for k in (1, 5):
        values = [found[f"top{k}_micro"] for found in result.figures.values()]
        axis.plot(values, range(len(values)), "o", markersize=4, label=f"top-{k}")
    share_axes(axis, len(result.figures))
    name_rows(axis, result.figures)
    name_axes(axis, f"{result.images:,} images of {len(result.classes):,} classes")
    figure.legend(loc="outside lower left", ncols=2, fontsize=8, frameon=False)
    save_figure(figure, path)


def draw_layers(path: Path, scores: Mapping[str, Any]) -> None:
    """Heat map of the layer scores: images down, texts across, the chosen pair framed."""
    from matplotlib.patches import Rectangle

    table = np.array(scores["table"])
    rows, columns = ([str(name) for name in scores[side]] for side in ("image_layers", "text_layers"))
    figure, (axis,) = new_figure(1, max(3.0, 0.24 * len(rows) + 1.2), max(4.5, 0.45 * len(columns) + 2.5))
    image = axis.imshow(table, aspect="auto", cmap="viridis")
    title = f"{score_title(scores)} of {scores['rows']:,} pairs, chance {scores['chance']:.3f}"
    name_axes(axis, title, "text layer", "image layer")
    axis.set_xticks(range(len(columns)), columns, fontsize=7, rotation=45)
    axis.set_yticks(range(len(rows)), rows, fontsize=7)
    row, column = rows.index(str(scores["chosen"][0])), columns.index(str(scores["chosen"][1]))
    axis.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=2))
    figure.colorbar(image).ax.tick_params(labelsize=7)
    save_figure(figure, path)


def score_title(scores: Mapping[str, Any]) -> str:
    """What layers were chosen by."""
    return "unbiased CKA" if scores["score_name"] == "cka" else f"mutual {scores['k']}-NN"


def _recalls(axis: Axes, comparison: Comparison, direction: str) -> None:
    """One line a candidate, one point a depth, in the order of the table."""
    places = np.arange(len(comparison.figures))
    for at, k in enumerate(comparison.ks):
        name = f"hit@{k}"
        values = np.array([found[direction][name] for found in comparison.figures.values()])
        # Chance is exact and has no interval.
        ends = [
            [found[direction].get(f"{name}_{end}", found[direction][name]) for found in comparison.figures.values()]
            for end in ("low", "high")
        ]
        lift = (at - (len(comparison.ks) - 1) / 2) * 0.16  # so that intervals do not hide each other
        axis.errorbar(values, places + lift, xerr=np.abs(np.array(ends) - values), fmt="o", color=f"C{at}",
                      markersize=4, elinewidth=1, label=f"R@{k}")  # fmt: skip
    share_axes(axis, len(places))


def _fit(axis: Axes, history: Sequence[Mapping[str, float]]) -> None:
    steps = [line["step"] for line in history]
    axis.plot(steps, [line["loss"] for line in history], color="0.6", marker="." if len(steps) < 3 else None)
    name_axes(axis, "fit", "step", "training loss")
    axis.yaxis.label.set_color("0.4")
    if "validation_mrr" in history[0]:
        other = axis.twinx()
        other.plot(steps, [line["validation_mrr"] for line in history], marker="." if len(steps) < 3 else None)
        other.set_ylabel("validation mean reciprocal rank", color="C0", fontsize=8)
        other.tick_params(labelsize=8)
