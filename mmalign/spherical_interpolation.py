"""Queries of a new model on the vectors of an old one, in closed form: a rotation and an interpolation on the sphere.

"Spherical Interpolation for Backward-Compatible Multimodal Representations", arXiv 2609.39836: paired rows of both
models give an orthogonal map (Procrustes) from the new space to the old one, and a query is found between what the old
model says and where the new one lands. No training, and the stored vectors stay as they are; both encoders are needed
for every query. Rows are unit rows, not centred. Where the new model is the wider one, the old side is zero-padded, so
only the first d_old coordinates of a query ever meet the stored vectors.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize, pad

from .checks import in_range
from .errors import InputError
from .representation_similarity import check_pairs, check_rows, widened

__all__ = ["interpolate_queries", "pad_columns", "padded_procrustes", "point_between", "slerp"]

CHUNK = 4096  # rows held in float64 at once


def interpolate_queries(
    query_old: Float[Tensor, "q d_old"],
    query_new: Float[Tensor, "q d_new"],
    rotation: Float[Tensor, "d_new d"],
    alpha: float,
) -> Float[Tensor, "q d"]:
    """The queries q_alpha = slerp(pad(query_old), query_new R, alpha) of arXiv 2609.39836, as unit rows.

    Args:
        query_old: unit rows of the old model.
        query_new: unit rows of the new model for the same queries.
        rotation: what `padded_procrustes` gave.
        alpha: 0 the old query, 1 the new one. 0.5 is a good start; choose it on held-out pairs.

    Raises:
        InputError: the widths do not fit the rotation, the rows cannot be paired, or alpha is not in [0, 1].
    """
    if rotation.ndim != 2 or query_new.shape[-1] != rotation.shape[0]:
        shapes = f"{tuple(query_new.shape)} and rotation {tuple(rotation.shape)}"
        raise InputError(f"query_new has shape {shapes}; give the rotation fitted for this new model")
    return slerp(pad_columns(query_old, rotation.shape[1]), query_new @ rotation, alpha)


@torch.no_grad()
def padded_procrustes(new: Float[Tensor, "n d_new"], old: Float[Tensor, "n d_old"]) -> Float[Tensor, "d_new d"]:
    """The orthogonal R from rows of the new model to those of the old: new @ R ~ pad(old), d = max(d_new, d_old).

        R = argmin ||new R - pad(old)||_F,   new^T pad(old) = P S Q^T,   R = P Q^T

    Columns are orthonormal, R^T R = I, where d_new >= d_old; rows are, R R^T = I, where d_new <= d_old. Lengths and
    angles among rows of the new model are kept. With d_new > d_old, the columns from d_old on are some orthonormal
    basis of the directions that the old space does not have; which one does not matter to scores. The same holds
    for every direction that the pairs do not determine: give a few thousand, 5 d or more.

    Sums and decomposition are in float64 where the device has it; the answer is in the dtype of `new`.

    Args:
        new: unit rows of the new model.
        old: unit rows of the old model for the same items, in the same order.

    Raises:
        InputError: the rows cannot be paired; x in the message is `new`, y is `old`.
    """
    check_pairs(new, old)
    d_new, d_old = new.shape[1], old.shape[1]
    across = widened(new[:0]).new_zeros(d_new, max(d_new, d_old))
    for start in range(0, len(new), CHUNK):
        across[:, :d_old] += widened(new[start : start + CHUNK]).T @ widened(old[start : start + CHUNK])
    p, _, qh = torch.linalg.svd(across, full_matrices=False)
    return (p @ qh).to(new.dtype)


def slerp(
    start: Float[Tensor, "q d"], end: Float[Tensor, "q d"], alpha: float, *, eps: float = 1e-7
) -> Float[Tensor, "q d"]:
    """The point at share alpha of the way from start to end along the great circle, row by row, as unit rows.

        theta = angle(u, v),   q = (sin((1 - alpha) theta) u + sin(alpha theta) v) / sin(theta)

    Args:
        start: unit rows u.
        end: unit rows v.
        alpha: 0 gives start, 1 gives end.
        eps: the cosine is clamped to [-1 + eps, 1 - eps], and at least to what the dtype can tell from 1: identical
            rows give themselves. Exactly opposite rows have no way between them: the nearer end is given, and start
            at the middle.

    Raises:
        InputError: the shapes differ, a row is not finite, alpha is not in [0, 1], or eps not in [0, 0.5].
    """
    if start.shape != end.shape:
        shapes = f"{tuple(start.shape)}, end {tuple(end.shape)}"
        raise InputError(f"start has shape {shapes}; give one row of the same width each")
    check_rows("start", start, least=0)
    check_rows("end", end, least=0)
    in_range("alpha", alpha, 0, 1)
    in_range("eps", eps, 0, 0.5)
    return point_between(start, end, alpha, eps)


def point_between(
    start: Float[Tensor, "q d"], end: Float[Tensor, "q d"], alpha: float, eps: float = 1e-7
) -> Float[Tensor, "q d"]:
    """`slerp` without its checks, for callers that search one query at a time."""
    eps = max(eps, torch.finfo(start.dtype).eps)
    theta = (start * end).sum(1, keepdim=True).clamp(-1 + eps, 1 - eps).acos()
    between = (((1 - alpha) * theta).sin() * start + (alpha * theta).sin() * end) / theta.sin()
    return normalize(torch.where(between.any(1, keepdim=True), between, start), dim=1)


def pad_columns(rows: Float[Tensor, "n d"], dim: int) -> Float[Tensor, "n dim"]:
    """Zeros to the right of the rows up to `dim` columns.

    Raises:
        InputError: the rows have more columns than that.
    """
    if rows.ndim != 2 or rows.shape[1] > dim:
        raise InputError(
            f"rows have shape {tuple(rows.shape)} and dim is {dim}; give a matrix of {dim} columns or less"
        )
    return pad(rows, (0, dim - rows.shape[1]))
