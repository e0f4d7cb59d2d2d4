"""Pictures of an alignment: what it finds and names beside its baselines, how it was fitted, and layer scores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..evaluation import Comparison, ZeroShot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_layers", "draw_report", "draw_zero_shot", "score_title"]

_WIDEST = 40  # letters of a name
_TITLES = {"text_to_image": "text to image", "image_to_text": "image to text"}


def draw_report(path: Path, comparison: Comparison, history: Sequence[Mapping[str, float]] = ()) -> None:
    """R@k of every candidate with 95 % intervals, both directions; and the way of the fit where there is one."""
    figure, axes = _figure(2 + bool(history), max(3.0, 1.4 + 0.42 * len(comparison.figures)))
    for axis, (direction, title) in zip(axes, _TITLES.items(), strict=False):
        _recalls(axis, comparison, direction)
        axis.set_title(f"{title}  ({comparison.images:,} images, {comparison.captions:,} captions)", fontsize=9)
    _name_rows(axes[0], comparison.figures)
    axes[1].set_yticks(range(len(comparison.figures)), [""] * len(comparison.figures))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=9, fontsize=8, frameon=False)
    if history:
        _fit(axes[2], history)
    _save(figure, path)


def draw_zero_shot(path: Path, result: ZeroShot) -> None:
    """Top-1 and top-5 accuracy over the images of every candidate."""
    figure, (axis,) = _figure(1, max(3.0, 1.4 + 0.42 * len(result.figures)), 6.0)
    for k in (1, 5):
        values = [found[f"top{k}_micro"] for found in result.figures.values()]
        axis.plot(values, range(len(values)), "o", markersize=4, label=f"top-{k}")
    _shares(axis, len(result.figures))
    _name_rows(axis, result.figures)
    axis.set_title(f"{result.images:,} images of {len(result.classes):,} classes", fontsize=9)
    figure.legend(loc="outside lower left", ncols=2, fontsize=8, frameon=False)
    _save(figure, path)


def draw_layers(path: Path, scores: Mapping[str, Any]) -> None:
    """Heat map of the layer scores: images down, texts across, the chosen pair framed."""
    from matplotlib.patches import Rectangle

    table = np.array(scores["table"])
    rows, columns = ([str(name) for name in scores[side]] for side in ("image_layers", "text_layers"))
    figure, (axis,) = _figure(1, max(3.0, 0.24 * len(rows) + 1.2), max(4.5, 0.45 * len(columns) + 2.5))
    image = axis.imshow(table, aspect="auto", cmap="viridis")
    axis.set_xticks(range(len(columns)), columns, fontsize=7, rotation=45)
    axis.set_yticks(range(len(rows)), rows, fontsize=7)
    axis.set_xlabel("text layer", fontsize=8)
    axis.set_ylabel("image layer", fontsize=8)
    row, column = rows.index(str(scores["chosen"][0])), columns.index(str(scores["chosen"][1]))
    axis.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=2))
    axis.set_title(f"{score_title(scores)} of {scores['rows']:,} pairs, chance {scores['chance']:.3f}", fontsize=9)
    figure.colorbar(image).ax.tick_params(labelsize=7)
    _save(figure, path)


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
    _shares(axis, len(places))


def _shares(axis: Axes, candidates: int) -> None:
    """From 0 to 1, one line a candidate, the first on top."""
    axis.set_xlim(-0.02, 1.02)
    axis.set_ylim(candidates - 0.5, -0.5)
    axis.tick_params(labelsize=8)
    axis.grid(axis="x", color="0.9")
    axis.hlines(np.arange(1, candidates) - 0.5, -0.02, 1.02, color="0.9", linewidth=0.8)


def _name_rows(axis: Axes, names: Iterable[str]) -> None:
    shown = [_short(name) for name in names]
    axis.set_yticks(range(len(shown)), shown, fontsize=8, parse_math=False)


def _fit(axis: Axes, history: Sequence[Mapping[str, float]]) -> None:
    steps = [line["step"] for line in history]
    axis.plot(steps, [line["loss"] for line in history], color="0.6", marker="." if len(steps) < 3 else None)
    axis.set_xlabel("step", fontsize=8)
    axis.set_ylabel("training loss", fontsize=8, color="0.4")
    axis.tick_params(labelsize=8)
    axis.set_title("fit", fontsize=9)
    if "validation_mrr" in history[0]:
        other = axis.twinx()
        other.plot(steps, [line["validation_mrr"] for line in history], marker="." if len(steps) < 3 else None)
        other.set_ylabel("validation mean reciprocal rank", color="C0", fontsize=8)
        other.tick_params(labelsize=8)


def _short(name: str) -> str:
    """Names may be paths: their ends tell them apart."""
    return name if len(name) <= _WIDEST else f"…{name[1 - _WIDEST :]}"


def _figure(panels: int, height: float, width: float = 4.6) -> tuple[Any, Any]:
    # Not pyplot: it holds global state and looks for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * panels, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, np.atleast_1d(figure.subplots(1, panels))


def _save(figure: Any, path: Path) -> None:
    # Without the version of matplotlib in it, the same numbers give the same file.
    figure.savefig(path, metadata={"Software": None})
