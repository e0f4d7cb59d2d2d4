"""Diversity reports side by side: a table for a terminal, and a picture of how alike the images of each prompt are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mmalign.metrics import HIGHER_IS_MORE_DIVERSE
from mmalign.plotting import name_axes, name_rows, new_figure, save_figure

from .measuring import DiversityReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["diversity_table", "draw_diversity"]

_TITLES = {
    "within_prompt_similarity": "similarity within prompts",
    "between_prompt_similarity": "similarity between prompts",
    "identity_similarity": "identity similarity (IDS)",
    "spatial_diversity": "spatial diversity (SDI)",
    "coverage": "coverage (ASC form)",
    "tonal_variation": "tonal variation (PVS)",
    "saturation_variation": "- of saturation",
    "value_variation": "- of value",
    "contrast_variation": "- of contrast",
}
_WIDEST = 26
_MOST_PROMPTS = 30


def diversity_table(reports: Mapping[str, DiversityReport]) -> list[str]:
    """Lines: every figure that a set has, sets below each other, with 95 % intervals over prompts."""
    names = {name: name if len(name) <= _WIDEST else f"…{name[1 - _WIDEST :]}" for name in reports}
    width = max(3, *map(len, names.values()))
    title = max(map(len, _TITLES.values()))
    lines = [f"{'':<{title}}  {'more diverse':<12}  {'set':<{width}}  {'value':>6}  95 % interval"]
    for name, higher in HIGHER_IS_MORE_DIVERSE.items():
        head = f"{_TITLES[name]:<{title}}  {'higher' if higher else 'lower':<12}"
        for label, report in reports.items():
            if name not in report.values:
                continue
            low_high = report.intervals.get(name)
            between = "" if low_high is None else f"[{low_high[0]:.3f}, {low_high[1]:.3f}]"
            lines.append(f"{head}  {names[label]:<{width}}  {report.values[name]:>6.3f}  {between}".rstrip())
            head = " " * len(head)
    return lines


def draw_diversity(path: Path, reports: Mapping[str, DiversityReport]) -> None:
    """Similarity within each prompt: left, all prompts of each set with their mean; right, the prompts most alike."""
    found = {label: report.per_prompt.get("within_prompt_similarity", {}) for label, report in reports.items()}
    prompts = dict.fromkeys(prompt for values in found.values() for prompt in values)
    highest = {prompt: max(values.get(prompt, -1) for values in found.values()) for prompt in prompts}
    alike = sorted(prompts, key=lambda prompt: -highest[prompt])[:_MOST_PROMPTS]
    figure, axes = new_figure(2, max(3.0, 1.4 + 0.22 * len(alike), 1.4 + 0.42 * len(reports)), 5.2)
    rng = np.random.default_rng(0)
    for row, (label, values) in enumerate(found.items()):
        axes[0].plot(list(values.values()), row + rng.uniform(-0.2, 0.2, len(values)), ".", markersize=4, alpha=0.5)
        report = reports[label]
        mean = report.values.get("within_prompt_similarity")
        if mean is not None:
            low, high = report.intervals.get("within_prompt_similarity", (mean, mean))
            axes[0].plot([low, high], [row, row], color="black", linewidth=1.5)
            axes[0].plot(mean, row, "D", color="black", markersize=5)
        places = [place for place, prompt in enumerate(alike) if prompt in values]
        axes[1].plot([values[alike[place]] for place in places], places, "o", markersize=4, label=label)
    _rows(axes[0], len(found), "each prompt, mean and 95 % interval")
    name_rows(axes[0], found)
    _rows(axes[1], max(len(alike), 1), f"the {len(alike)} prompts with the most alike images")
    name_rows(axes[1], (prompt or "(all images)" for prompt in alike))
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower left", ncols=3, fontsize=8, frameon=False)
    save_figure(figure, path)


def _rows(axis: Axes, rows: int, title: str) -> None:
    axis.set_ylim(rows - 0.5, -0.5)
    axis.grid(axis="x", color="0.9")
    name_axes(axis, title, "mean cosine of a prompt's images (lower is more diverse)")
