"""What kernel alignment has changed, on held-out images: kernels, drift, retrieval and classification."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch.nn.functional import normalize

from ...evaluation import Comparison
from ...files import read_object, whole_file
from ...kernel_alignment import Kernel, cosine_shift_bound, kernel_alignment_loss, nearest_pairs_error
from ...plotting import name_axes, new_figure, save_figure

__all__ = ["KernelReport", "drift_of", "kernel_errors", "read_report", "write_report"]

_FILE = "kernel_alignment.json"
_ROWS = 2000  # a kernel matrix of more would take gigabytes


@dataclass
class KernelReport:
    """What `align_to_teacher` leaves to be looked at; all figures on images that were not trained on.

    Attributes:
        kernel: "before" and "after", each with `align` (mean squared difference of the kernel matrices, without their
            diagonal; of 2,000 images at most) and `nearest` (of the 5 % of pairs most alike to the teacher).
        drift: of image vectors: `cosine_mean`, `cosine_p5` (with the vectors before); `shift_mean`, `shift_max`, the
            absolute change of the cosines with the texts looked at; `bound_max`, how far any text's could have moved.
        retrieval: `Comparison.to_dict()` of "before", "after" and chance; `None` without captions of held-out images.
        zero_shot: of "before", "after" and chance: accuracies; `None` without labels of two classes.
        counts: `training`, `test` (images), `captions`, `texts` (that the running check looks at), `left_out`.
        kernels: of student and teacher, as settled before training; the student's parameter in the end, where trained.
        history: see `KernelAlignmentLoop`.
        settings: all that the result depends on.
        skipped: images that could not be read: `name`, `reason`, `message`.
        warnings: what a person should know.
        folder: the encoder's.
    """

    kernel: dict[str, dict[str, float]]
    drift: dict[str, float]
    retrieval: dict[str, Any] | None
    zero_shot: dict[str, dict[str, float]] | None
    counts: dict[str, int]
    kernels: dict[str, Any]
    history: list[dict[str, Any]]
    settings: dict[str, Any]
    skipped: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    folder: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return asdict(self)

    def table(self) -> list[str]:
        """Lines for a terminal."""
        counts, drift = self.counts, self.drift
        lines = [
            f"{counts['training']:,} training images, {counts['test']:,} to measure on",
            "",
            f"{'':<34}{'before':>10}{'after':>10}{'change':>9}",
        ]
        for name, title in (("align", "kernel error, all pairs"), ("nearest", "kernel error, most alike 5 %")):
            before, after = (self.kernel[when][name] for when in ("before", "after"))
            change = f"{after / before - 1:+.0%}" if before else "-"
            lines.append(f"{title:<34}{before:>10.5f}{after:>10.5f}{change:>9}")
        if self.zero_shot is not None:
            before, after = (self.zero_shot[when]["top1_micro"] for when in ("before", "after"))
            lines.append(f"{'zero-shot accuracy':<34}{before:>10.3f}{after:>10.3f}{after - before:>+9.3f}")
        lines += [
            "",
            f"cosine of image vectors with those before: mean {drift['cosine_mean']:.4f}, 5th percentile "
            f"{drift['cosine_p5']:.4f}",
        ]
        if "shift_mean" in drift:
            lines.append(
                f"cosines with {counts['texts']:,} texts moved by {drift['shift_mean']:.4f} in the mean, "
                f"{drift['shift_max']:.4f} at most (any text's by {drift['bound_max']:.4f} at most)"
            )
        if self.retrieval is not None:
            lines += ["", *Comparison.from_dict(self.retrieval).table()]
        return lines


def kernel_errors(
    student: Float[np.ndarray, "n dim"],
    teacher: Float[np.ndarray, "n teacher_dim"],
    kernels: tuple[Kernel, Kernel],
) -> dict[str, float]:
    """`align` and `nearest` as in `KernelReport.kernel`."""
    z, t = (torch.from_numpy(rows[:_ROWS]) for rows in (student, teacher))
    loss = kernel_alignment_loss(z, z, t, *kernels, diagonal=False)
    return {"align": float(loss.align), "nearest": float(nearest_pairs_error(loss.student, loss.teacher))}


def drift_of(
    before: Float[np.ndarray, "n dim"], after: Float[np.ndarray, "n dim"], texts: Float[np.ndarray, "m dim"]
) -> dict[str, float]:
    """`KernelReport.drift` from raw features, and unit rows of texts, of which there may be none."""
    old, new = torch.from_numpy(before), torch.from_numpy(after)
    cosines = torch.cosine_similarity(new, old)
    found = {
        "cosine_mean": float(cosines.mean()),
        "cosine_p5": float(cosines.quantile(0.05)),
        "bound_max": float(cosine_shift_bound(new, old).max()),
    }
    if len(texts):
        moved = ((normalize(new, dim=1) - normalize(old, dim=1)) @ torch.from_numpy(texts).T).abs()
        found |= {"shift_mean": float(moved.mean()), "shift_max": float(moved.max())}
    return found


def write_report(report: KernelReport, folder: Path) -> None:
    """Write the curves, then the report, into the encoder's folder: the report last, as it says that all is there."""
    _draw(folder / "kernel_alignment.png", report.history)
    with whole_file(folder / _FILE) as path:
        path.write_text(json.dumps(report.to_dict(), indent=1, allow_nan=False), encoding="utf-8")


def read_report(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What `write_report` wrote; `{}` where there is none that can be read."""
    return read_object(Path(folder) / _FILE)


def _draw(path: Path, history: Sequence[Mapping[str, Any]]) -> None:
    panels = {
        "kernel error": {"align": "training", "held_out_align": "held out", "held_out_nearest": "held out, most alike"},
        "squared distance from the original features": {"reg": "training"},
        "do the texts still fit? (held out)": {
            "kept_cosine": "cosine with the original vector",
            "same_best_text": "same best text as before",
            "text_hit@1": "caption finds its image",
        },
    }
    figure, axes = new_figure(len(panels), 3.2, 4.2)
    steps = [line["step"] for line in history]
    for axis, (title, names) in zip(axes, panels.items(), strict=True):
        for name, label in names.items():
            if name in history[0]:
                axis.plot(steps, [line[name] for line in history], marker="." if len(steps) < 3 else None, label=label)
        name_axes(axis, title, "step")
        axis.grid(color="0.9")
        axis.legend(fontsize=7)
    axes[0].set_ylim(bottom=0)
    save_figure(figure, path)
