"""Spread of embeddings between classes and within them, as losses: after DAPT, arXiv 2309.03406.

"Distribution-Aware Prompt Tuning" tunes text prompts so that class texts spread out (inter-dispersion, a Gaussian
potential of squared distances) and visual prompts so that images gather at the prototype of their class
(intra-dispersion, a squared distance). Ours: means in place of sums, so that the size does not grow with the batch;
rows normalised inside; labels, so that rows of one class do not push each other; the prototype is the mean row of the
batch's own class, with gradient, not re-normalised.

Pure functions on tensors, in float32 or better with autocast off.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .checks import in_range
from .contrastive import unit_rows
from .errors import InputError

__all__ = ["inter_dispersion", "intra_dispersion"]


def inter_dispersion(
    rows: Float[Tensor, "n d"], *, labels: Int[Tensor, " n"] | None = None, t: float = 2.0
) -> Float[Tensor, ""]:
    """Mean over ordered pairs i != j of exp(-t ||u_i - u_j||^2), u the unit rows: pushes rows apart.

    Args:
        rows: one embedding an item, or one a class (the paper: the texts of the classes).
        labels: only pairs of different labels count; without it every pair.
        t: sharpness, above 0; 2 in the paper.

    Returns:
        In [exp(-4 t), 1]: 1 where all rows coincide; 0, with a gradient of 0, where no pair counts.

    Raises:
        InputError: `t` is not above 0, or the shapes do not fit.
    """
    in_range("t", t, 1e-6)
    apart = ~torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    if labels is not None:
        _check_labels(rows, labels)
        apart = labels[:, None] != labels[None, :]
    with torch.autocast(rows.device.type, enabled=False):
        unit = unit_rows(rows, "rows")
        potential = torch.exp(2 * t * (unit @ unit.T - 1))  # ||u - v||^2 = 2 - 2 u v
        return (potential * apart).sum() / apart.sum().clamp_min(1)


def intra_dispersion(rows: Float[Tensor, "n d"], labels: Int[Tensor, " n"]) -> Float[Tensor, ""]:
    """Mean over rows of ||u_i - mean of the u of its label||^2: pulls each label together.

    Args:
        rows: one embedding an item; normalised inside.
        labels: any whole numbers.

    Returns:
        In [0, 1]: 0, with a gradient of 0, where every label has one row.

    Raises:
        InputError: the shapes do not fit.
    """
    _check_labels(rows, labels)
    with torch.autocast(rows.device.type, enabled=False):
        unit = unit_rows(rows, "rows")
        _, label, count = torch.unique(labels, return_inverse=True, return_counts=True)
        means = unit.new_zeros(len(count), unit.shape[1]).index_add(0, label, unit) / count[:, None]
        return (unit - means[label]).square().sum(1).mean()


def _check_labels(rows: Tensor, labels: Tensor) -> None:
    if labels.shape != rows.shape[:1]:
        raise InputError(f"labels have shape {tuple(labels.shape)}; give one for each of the {len(rows)} rows")
