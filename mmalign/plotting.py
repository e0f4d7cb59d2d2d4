"""Pictures of figures in one style: panels side by side, drawn without a display."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["name_axes", "name_rows", "new_figure", "save_figure", "share_axes"]

_WIDEST = 40  # letters of a name


def new_figure(panels: int, height: float, width: float = 4.6) -> tuple[Any, Any]:
    """A figure, and its axes from left to right.

    Args:
        panels: one or more.
        height: inches.
        width: inches, of one panel.
    """
    # Not pyplot: it holds global state and looks for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * panels, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, np.atleast_1d(figure.subplots(1, panels))


def save_figure(figure: Any, path: Path) -> None:
    """Write a PNG without the version of matplotlib in it, so that the same numbers give the same file."""
    figure.savefig(path, metadata={"Software": None})


def name_axes(axis: Axes, title: str, x: str = "", y: str = "") -> None:
    """What a panel shows, in letters that fit it."""
    axis.set_title(title, fontsize=9)
    axis.set_xlabel(x, fontsize=8)
    axis.set_ylabel(y, fontsize=8)
    axis.tick_params(labelsize=8)


def share_axes(axis: Axes, candidates: int) -> None:
    """From 0 to 1, one line a candidate, the first on top."""
    axis.set_xlim(-0.02, 1.02)
    axis.set_ylim(candidates - 0.5, -0.5)
    axis.grid(axis="x", color="0.9")
    axis.hlines(np.arange(1, candidates) - 0.5, -0.02, 1.02, color="0.9", linewidth=0.8)


def name_rows(axis: Axes, names: Iterable[str]) -> None:
    """Candidates' names at their lines. Names may be paths: of long ones the end is kept, which tells them apart."""
    shown = [name if len(name) <= _WIDEST else f"…{name[1 - _WIDEST :]}" for name in names]
    axis.set_yticks(range(len(shown)), shown, fontsize=8, parse_math=False)
