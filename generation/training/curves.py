"""A run's curves as one picture: what fell, what rose, and when."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmalign.files import whole_file

__all__ = ["draw_curves"]


def draw_curves(metrics: Path, path: Path, panels: Mapping[str, Sequence[str]]) -> Path:
    """Draw `metrics.jsonl` into a picture; training values as a moving mean over a twentieth of the run.

    Args:
        metrics: a line of JSON a step.
        path: of the picture, a PNG.
        panels: from left to right, the heading and the logged values in it; those that never occur are left out.
    """
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    found = {head: [n for n in names if any(n in row for row in rows)] for head, names in panels.items()}
    found = {head: names for head, names in found.items() if names}
    figure = Figure(figsize=(4 * max(len(found), 1), 3), layout="constrained")
    axes_of = figure.subplots(1, max(len(found), 1), squeeze=False)[0]
    for axes, (heading, names) in zip(axes_of, found.items(), strict=False):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if name in row]
            window = max(len(points) // 20, 1) if not name.startswith("probe_") else 1
            steps = [step for step, _ in points]
            values = [value for _, value in points]
            means = [sum(values[max(i - window + 1, 0) : i + 1]) / min(window, i + 1) for i in range(len(values))]
            axes.plot(steps, means, marker="." if len(points) < 30 else "", label=name)
        axes.set(title=heading, xlabel="step")
        if len(names) > 1:
            axes.legend(fontsize="small")
    with whole_file(path) as fresh:
        figure.savefig(fresh, dpi=100, format="png")
    return path
