"""What an alignment run leaves to be looked at: a table, `report.json`, `report.png`, `layers.png`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evaluation import Comparison
from ..files import read_object
from .drawing import draw_layers, draw_report, score_title

if TYPE_CHECKING:
    from .encoder import AlignedEncoder
    from .result import Alignment

__all__ = ["AlignmentRun", "read_report", "report_lines", "write_report"]

_FILE = "report.json"


@dataclass
class AlignmentRun:
    """What `align_encoders` or `align_features` made.

    Attributes:
        encoder: of images and texts, saved in `folder`; `None` if features came without encoders.
        alignment: its heads with the history of the fit.
        report: what was measured; also in the folder.
        folder: `None` if nothing was saved.
        warnings: what a person should know.
    """

    encoder: AlignedEncoder | None
    alignment: Alignment
    report: dict[str, Any]
    folder: Path | None
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return {**self.report, "folder": None if self.folder is None else os.fspath(self.folder)}

    def lines(self) -> list[str]:
        """For a terminal."""
        return report_lines(self.report)


def write_report(report: Mapping[str, Any], folder: Path) -> None:
    """Write the report and its pictures into a folder."""
    (folder / _FILE).write_text(json.dumps(report, indent=1, allow_nan=False), encoding="utf-8")
    draw_report(folder / "report.png", Comparison.from_dict(report["retrieval"]), report["history"])
    if report["layers"]:
        draw_layers(folder / "layers.png", report["layers"])


def read_report(folder: Path) -> dict[str, Any]:
    """What `write_report` wrote; `{}` where there is none that can be read."""
    return read_object(folder / _FILE)


def report_lines(report: Mapping[str, Any]) -> list[str]:
    """The report for a terminal."""
    counts, comparison = report["pairs"], Comparison.from_dict(report["retrieval"])
    lines = [
        f"{counts['training']:,} training images, {counts['held_out']:,} held out while fitting, {counts['test']:,} to "
        "measure",
    ]
    if layers := report["layers"]:
        lines.append(
            f"layers: image {layers['chosen'][0]}, text {layers['chosen'][1]}; {score_title(layers)} "
            f"{layers['score']:.3f} of {layers['rows']:,} pairs (chance {layers['chance']:.3f}, own outputs "
            f"{layers['own']:.3f})"
        )
    lines += ["", *comparison.table()]
    if zero := report["zero_shot"]:
        lines += ["", f"zero-shot, {zero['images']:,} images of {len(zero['classes'])} classes"]
        width = max(12, *map(len, zero["figures"]))
        for name, found in zero["figures"].items():
            lines.append(f"{name:<{width}}  top-1 {found['top1_micro']:.3f}  top-5 {found['top5_micro']:.3f}")
    if report["opis"]:
        figures = ", ".join(f"{name} {found['opis']:.2g}" for name, found in report["opis"].items())
        lines += ["", f"OPIS (0: one threshold serves all images alike): {figures}"]
    return [*lines, *(f"note: {note}" for note in comparison.notes)]
