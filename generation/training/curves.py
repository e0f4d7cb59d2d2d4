"""A run's curves as one picture: what fell, what rose, and when."""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["draw_curves"]

# Panels from left to right: heading, and the logged values in it.
_PANELS = {
    "loss": ("loss",),
    "denoising error (probe)": ("probe_mse_w", "probe_mse_l", "probe_mse"),
    "margin accuracy": ("margin_accuracy", "probe_margin_accuracy"),
    "gradient norm": ("grad_norm",),
}


def draw_curves(metrics: Path, path: Path) -> Path:
    """Draw `metrics.jsonl` into a picture; training values as a moving mean over a twentieth of the run."""
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    panels = {head: [n for n in names if any(n in row for row in rows)] for head, names in _PANELS.items()}
    panels = {head: names for head, names in panels.items() if names}
    figure = Figure(figsize=(4 * len(panels), 3), layout="constrained")
    for axes, (heading, names) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
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
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=100, format="png")
    return temporary.replace(path)
