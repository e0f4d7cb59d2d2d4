"""Losses that bring an image tower's similarities to those of a vision-only teacher, images alone. Pure functions.

"Kernel-based Unsupervised Embedding Alignment for Enhanced Visual Representation in Vision-language Models" (KUEA),
arXiv 2506.02557. Similarities of a batch's images are compared as kernel matrices, so that student and teacher may have
any widths and no projection is trained; a penalty keeps every feature near what it was, so that the frozen text tower
still fits. `mmalign.fine_tuning.align_to_teacher` trains with it.

The released code says that it trains the student kernel's parameters, and does not (gradients reach a copy that the
loss never reads). Here kernels are what they are given: numbers, or tensors whose gradients are right.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from .checks import at_least, in_range
from .errors import InputError

__all__ = [
    "CosineKernel",
    "GaussianKernel",
    "Kernel",
    "KernelAlignment",
    "PolynomialKernel",
    "cosine_shift_bound",
    "fit_kernel_offset",
    "kernel_alignment_loss",
    "kernel_matrix",
    "median_distance",
    "nearest_pairs_error",
    "teacher_kernel",
]

Number: TypeAlias = "float | Float[Tensor, '']"


@dataclass(frozen=True)
class PolynomialKernel:
    """k(x, y) = (gamma x.y + offset)^degree, divided by sqrt(k(x, x) k(y, y)).

    Only offset / gamma matters: both times the same positive number give the same matrix. gamma above 0 and an offset
    of 0 or more make it positive semi-definite. For raw features: with unit rows it takes another offset.

    Raises:
        InputError: gamma is not above 0, offset is below 0, or degree below 1.
    """

    offset: Number
    gamma: Number = 1.0
    degree: int = 3

    def __post_init__(self) -> None:
        at_least("degree", self.degree)
        in_range("offset", _number(self.offset), 0)
        in_range("gamma", _number(self.gamma), torch.finfo(torch.float32).tiny)


@dataclass(frozen=True)
class GaussianKernel:
    """k(x, y) = exp(-|x - y|^2 / (2 sigma^2)).

    Raises:
        InputError: sigma is not above 0.
    """

    sigma: Number

    def __post_init__(self) -> None:
        in_range("sigma", _number(self.sigma), torch.finfo(torch.float32).tiny)


@dataclass(frozen=True)
class CosineKernel:
    """k(x, y) = x.y / (|x| |y|)."""


Kernel: TypeAlias = "PolynomialKernel | GaussianKernel | CosineKernel"


class KernelAlignment(NamedTuple):
    """The loss, its two terms without their weights, and the matrices they were taken from; all with gradient."""

    total: Float[Tensor, ""]
    align: Float[Tensor, ""]
    reg: Float[Tensor, ""]
    student: Float[Tensor, "batch batch"]
    teacher: Float[Tensor, "batch batch"]


def teacher_kernel(width: int, degree: int = 3) -> PolynomialKernel:
    """The authors' kernel of the teacher: gamma 1 / width, offset 1."""
    return PolynomialKernel(offset=1.0, gamma=1 / width, degree=degree)


def kernel_matrix(
    x: Float[Tensor, "n dim"], kernel: Kernel, y: Float[Tensor, "m dim"] | None = None
) -> Float[Tensor, "n m"]:
    """Normalised kernel between rows, in [-1, 1]; between the rows of `x` themselves by default. Not centred.

    The polynomial is taken of gamma x.y + offset over its own norms, and raised to its degree last: numbers stay small.
    Float32 or better, with autocast off.
    """
    y = x if y is None else y
    with torch.autocast(x.device.type, enabled=False):
        x, y = (rows if rows.dtype == torch.float64 else rows.float() for rows in (x, y))
        if isinstance(kernel, GaussianKernel):
            # Not a square of `cdist`, whose gradient is not finite where two rows are the same.
            squares = (x * x).sum(dim=1)[:, None] + (y * y).sum(dim=1)[None] - 2 * x @ y.T
            return torch.exp(-squares.clamp(min=0) / (2 * kernel.sigma**2))
        if isinstance(kernel, CosineKernel):
            return normalize(x, dim=1) @ normalize(y, dim=1).T
        own = [kernel.gamma * (rows * rows).sum(dim=1) + kernel.offset for rows in (x, y)]
        cosine = (kernel.gamma * x @ y.T + kernel.offset) * own[0].rsqrt()[:, None] * own[1].rsqrt()[None]
        return cosine**kernel.degree


def kernel_alignment_loss(
    student: Float[Tensor, "batch dim"],
    original: Float[Tensor, "batch dim"],
    teacher: Float[Tensor, "batch teacher_dim"],
    student_kernel: Kernel,
    teacher_kernel: Kernel,
    *,
    weight: float = 0.5,
    reg_weight: float = 1.0,
    diagonal: bool = True,
) -> KernelAlignment:
    """Squared distance of two kernel matrices, and how far features have moved.

        align = mean_ij (K^S_ij - K^T_ij)^2
        reg   = mean_i |z_i - z0_i|^2                  summed over dimensions, not their mean
        total = reg_weight reg + weight align

    A batch without its diagonal (`diagonal=False`) is an unbiased estimate of the mean over all pairs of different
    images of the set it is drawn from; with it, as in the released code, the same times (batch - 1) / batch, as a
    normalised kernel is 1 there on both sides. Accumulating gradients over batches is no larger kernel.

    Args:
        student: features z of the tower that is trained, pooled and projected, NOT normalised.
        original: what the same tower gave before, z0.
        teacher: features of the frozen teacher; its class token after the final norm for DINOv2.
        student_kernel: see `fit_kernel_offset`.
        teacher_kernel: see `teacher_kernel`.
        weight: of `align`; the paper reports 0.5 to 1.
        reg_weight: of `reg`; 1 in the paper. With 0 the text tower no longer fits.
        diagonal: whether pairs of an image with itself are counted in the mean.

    Raises:
        InputError: shapes that do not fit, fewer than two rows, or a weight below 0.
    """
    if student.ndim != 2 or student.shape != original.shape or len(teacher) != len(student) or len(student) < 2:
        raise InputError(
            f"student has shape {tuple(student.shape)}, original {tuple(original.shape)}, teacher "
            f"{tuple(teacher.shape)}; give a row an image, two images or more, and as wide originals as students"
        )
    in_range("weight", weight, 0)
    in_range("reg_weight", reg_weight, 0)
    ours, theirs = kernel_matrix(student, student_kernel), kernel_matrix(teacher, teacher_kernel)
    squares = (ours - theirs.to(ours.dtype)) ** 2
    rows = len(student)
    align = squares.mean() if diagonal else (squares.sum() - squares.diagonal().sum()) / (rows * (rows - 1))
    reg = (student.to(ours.dtype) - original.to(ours.dtype)).square().sum(dim=1).mean()
    return KernelAlignment(reg_weight * reg + weight * align, align, reg, ours, theirs)


@torch.no_grad()
def fit_kernel_offset(
    student: Float[Tensor, "n dim"],
    teacher: Float[Tensor, "n teacher_dim"],
    *,
    teacher_kernel: Kernel,
    degree: int = 3,
) -> float:
    """The offset, at gamma 1, with which the student's polynomial kernel is nearest to the teacher's matrix.

    Squared error over pairs of different rows; searched over ten thousandths to ten thousand times the mean squared
    norm of the student's features. In the paper gamma and offset are fitted likewise, before training; only their ratio
    matters.

    Raises:
        InputError: fewer than two rows, or not as many.
    """
    from scipy.optimize import minimize_scalar

    if len(student) != len(teacher) or len(student) < 2:
        raise InputError(f"{len(student)} student rows and {len(teacher)} of the teacher; give two or more of each")
    x = student.double().cpu()
    wanted = kernel_matrix(teacher.double().cpu(), teacher_kernel)
    apart = ~torch.eye(len(x), dtype=torch.bool)
    scale = float((x * x).sum(dim=1).mean())

    def error(log_offset: float) -> float:
        found = kernel_matrix(x, PolynomialKernel(math.exp(log_offset) * scale, degree=degree))
        return float((found - wanted)[apart].square().mean())

    grid = [math.log(10) * step / 4 for step in range(-16, 17)]
    best = min(grid, key=error)
    step = grid[1] - grid[0]
    bounds = max(best - step, grid[0]), min(best + step, grid[-1])
    return math.exp(minimize_scalar(error, bounds=bounds, method="bounded").x) * scale


def median_distance(rows: Float[Tensor, "n dim"]) -> float:
    """Of all pairs of different rows: a sigma at which the median pair has a Gaussian kernel of exp(-1/2). Ours.

    Raises:
        InputError: fewer than two rows, or half of the pairs are the same rows.
    """
    if len(rows) < 2:
        raise InputError(f"{len(rows)} rows have no distance; give two or more")
    found = float(torch.nn.functional.pdist(rows.double()).median())
    if found <= 0:
        raise InputError("half of the pairs of rows are the same; give rows of different images")
    return found


def nearest_pairs_error(
    student: Float[Tensor, "batch batch"], teacher: Float[Tensor, "batch batch"], share: float = 0.05
) -> Float[Tensor, ""]:
    """Mean squared difference of two kernel matrices over the share of pairs that are most alike to the teacher.

    In a large batch most pairs are unrelated and agree already; their mean hides those that matter.

    Raises:
        InputError: a share outside (0, 1], fewer than two rows, or matrices of two shapes.
    """
    rows = len(teacher)
    if student.shape != teacher.shape or rows < 2:
        raise InputError(
            f"matrices have shapes {tuple(student.shape)} and {tuple(teacher.shape)}; give two of one shape, of two "
            "images or more"
        )
    in_range("share", share, 1e-12, 1)
    first, second = torch.triu_indices(rows, rows, 1, device=teacher.device)
    alike = teacher[first, second].topk(max(1, round(share * len(first)))).indices
    return (student - teacher)[first[alike], second[alike]].square().mean()


def cosine_shift_bound(student: Float[Tensor, "n dim"], original: Float[Tensor, "n dim"]) -> Float[Tensor, " n"]:
    """How far the cosine with any text can have moved, an image: 2 |z - z0| / max(|z|, |z0|) (Proposition 3.2)."""
    moved = (student - original).norm(dim=1)
    longer = torch.maximum(student.norm(dim=1), original.norm(dim=1))
    return 2 * moved / longer.clamp(min=torch.finfo(longer.dtype).tiny)


def _number(value: Number) -> float:
    return float(value.detach() if isinstance(value, Tensor) else value)
