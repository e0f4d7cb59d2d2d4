"""What a fine-tuned encoder is worth on held-out images, against old vectors and its own: table, json, pictures."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from ...files import read_object
from ...metrics import cmc_map_self_excluded
from ...metrics.chance import chance_hit
from ...plotting import name_axes, name_rows, new_figure, save_figure, share_axes

__all__ = ["CompatibilityReport", "measure", "read_report", "write_report"]

FIGURES = ("cmc@1", "cmc@5", "map")
_FILE = "report.json"
_ROWS = {
    "old/old": "old queries, old index",
    "new/old": "new queries, old index",
    "new/new": "new queries, new index",
    "chance": "chance",
}


@dataclass
class CompatibilityReport:
    """What `fine_tune_compatible` leaves to be looked at.

    Attributes:
        figures: "old/old", "new/old", "new/new" (queries/gallery) and "chance", each with cmc@1, cmc@5 and map on the
            held-out images, a query's own image left out.
        compatible: figure -> whether new/old is strictly above old/old, the criterion of backward compatibility.
        update_gain: figure -> (new/old - old/old) / (new/new - old/old): 1 where re-encoding the gallery would add
            nothing; `None` where it would add nothing anyway or harm.
        counts: `training`, `test` (images), `queries` (test images with another of their class), `classes`, `left_out`.
        history: one line an epoch.
        settings: all that the result depends on.
        skipped: images that could not be read: `name`, `reason`, `message`.
        warnings: what a person should know.
        folder: the encoder's.
    """

    figures: dict[str, dict[str, float]]
    compatible: dict[str, bool]
    update_gain: dict[str, float | None]
    counts: dict[str, int]
    history: list[dict[str, float]]
    settings: dict[str, Any]
    skipped: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    folder: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return asdict(self)

    def table(self) -> list[str]:
        """Lines for a terminal."""
        counts = self.counts
        lines = [
            f"{counts['training']:,} training images of {counts['classes']:,} classes, {counts['test']:,} to measure "
            f"on ({counts['queries']:,} with another of their class)",
            "",
            f"{'':<23}" + "".join(f"{name:>8}" for name in FIGURES),
        ]
        for name, title in _ROWS.items():
            lines.append(f"{title:<23}" + "".join(f"{self.figures[name][k]:8.3f}" for k in FIGURES))
        gains = (self.update_gain[k] for k in FIGURES)
        lines.append(f"{'update gain':<23}" + "".join(f"{'-' if gain is None else f'{gain:.0%}':>8}" for gain in gains))
        held = [name for name in FIGURES if self.compatible[name]]
        missed = [name for name in FIGURES if not self.compatible[name]]
        if not missed:
            verdict = "compatible: new queries find more in the old index than old ones do, by all three figures"
        elif held:
            verdict = f"compatible by {' and '.join(held)}, NOT by {' and '.join(missed)}"
        else:
            verdict = "NOT compatible: new queries find no more in the old index than old ones do"
        return [*lines, "", verdict]


def measure(
    old: Float[np.ndarray, "n old_dim"],
    new: Float[np.ndarray, "n dim"],
    new_compatible: Float[np.ndarray, "n old_dim"],
    labels: Int[np.ndarray, " n"],
) -> tuple[dict[str, dict[str, float]], dict[str, bool], dict[str, float | None], int]:
    """Figures, compatibility, update gain and number of queries, as in `CompatibilityReport`.

    Raises:
        InputError: no class has two images.
    """
    figures: dict[str, dict[str, float]] = {}
    queries = 0
    for name, query, gallery in (("old/old", old, old), ("new/old", new_compatible, old), ("new/new", new, new)):
        found = cmc_map_self_excluded(query, gallery, labels, topk=5)
        figures[name] = {"cmc@1": float(found.cmc[0]), "cmc@5": float(found.cmc[4]), "map": found.map}
        queries = found.n_valid
    sizes = np.bincount(labels)[labels]
    others = sizes[sizes > 1] - 1
    figures["chance"] = {f"cmc@{k}": chance_hit(others, len(labels) - 1, k) for k in (1, 5)}
    figures["chance"]["map"] = float(np.mean([_chance_ap(int(n), len(labels) - 1) for n in others]))
    compatible = {k: figures["new/old"][k] > figures["old/old"][k] for k in FIGURES}
    gain: dict[str, float | None] = {}
    for k in FIGURES:
        room = figures["new/new"][k] - figures["old/old"][k]
        gain[k] = (figures["new/old"][k] - figures["old/old"][k]) / room if room > 0 else None
    return figures, compatible, gain, queries


def _chance_ap(relevant: int, gallery: int) -> float:
    """Expected average precision of a random order: 1/n sum_i (1 + (r - 1)(i - 1)/(n - 1)) / i."""
    harmonic = float((1 / np.arange(1, gallery + 1)).sum())
    if gallery == 1:
        return 1.0
    slope = (relevant - 1) / (gallery - 1)
    return (harmonic * (1 - slope) + slope * gallery) / gallery


def write_report(report: Mapping[str, Any], folder: Path) -> None:
    """Write the report and its pictures into a folder."""
    (folder / _FILE).write_text(json.dumps(report, indent=1, allow_nan=False), encoding="utf-8")
    _draw_figures(folder / "report.png", report["figures"])
    _draw_curves(folder / "curves.png", report["history"])


def read_report(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What `write_report` wrote; `{}` where there is none that can be read."""
    return read_object(Path(folder) / _FILE)


def _draw_figures(path: Path, figures: Mapping[str, Mapping[str, float]]) -> None:
    figure, (axis,) = new_figure(1, 3.0, 6.0)
    for at, name in enumerate(FIGURES):
        lift = (at - 1) * 0.16
        places = np.arange(len(_ROWS)) + lift
        axis.plot([figures[row][name] for row in _ROWS], places, "o", markersize=4, label=name)
    share_axes(axis, len(_ROWS))
    name_rows(axis, _ROWS.values())
    name_axes(axis, "held-out images of the same class found")
    figure.legend(loc="outside lower left", ncols=3, fontsize=8, frameon=False)
    save_figure(figure, path)


def _draw_curves(path: Path, history: Sequence[Mapping[str, float]]) -> None:
    panels = {"loss": ["loss"], "its terms, without their weights": ["ce", "bct", "cos"]}
    figure, axes = new_figure(len(panels), 3.0, 4.0)
    epochs = [line["epoch"] for line in history]
    for axis, (title, names) in zip(axes, panels.items(), strict=True):
        for name in names:
            axis.plot(epochs, [line[name] for line in history], marker="." if len(epochs) < 3 else None, label=name)
        name_axes(axis, title, "epoch")
        axis.grid(color="0.9")
    axes[1].legend(fontsize=8)
    save_figure(figure, path)
