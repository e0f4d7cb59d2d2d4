"""Maps between two frozen representations in closed form, from paired rows: no training loop.

CCA with the weighted score of "CSA: Data-efficient Mapping of Unimodal Features to Multimodal Features", arXiv
2410.07610; ridge regression; orthogonal Procrustes; relative representations as in ASIF, "Coupled Data Turns Unimodal
Models to Multimodal Without Training", arXiv 2210.01738. Fits compute in float64 where the device has it and answer in
the dtype of x.

Choosing: with pairs near the number of dimensions or fewer, shrinkage (CCA) or regularisation (ridge) decides whether
the map is of any use; choose it on held-out pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from .checks import at_least, in_range
from .errors import InputError
from .representation_similarity import check_pairs, check_rows, widened

__all__ = [
    "CCA",
    "LinearMap",
    "asif_coordinates",
    "csa_coordinates",
    "csa_scores",
    "fit_cca",
    "fit_procrustes",
    "fit_ridge",
    "procrustes",
]


class CCA(NamedTuple):
    """Canonical directions, the most correlated first; r = min(d_x, d_y). Signs are shared by the two sides."""

    mean_x: Float[Tensor, " d_x"]
    mean_y: Float[Tensor, " d_y"]
    projection_x: Float[Tensor, "d_x r"]
    projection_y: Float[Tensor, "d_y r"]
    correlations: Float[Tensor, " r"]


class LinearMap(NamedTuple):
    """A matrix from x to y with the means it was fitted around; the fit says how to apply it."""

    mean_x: Float[Tensor, " d_x"]
    mean_y: Float[Tensor, " d_y"]
    matrix: Float[Tensor, "d_x d_y"]


def fit_cca(x: Float[Tensor, "n d_x"], y: Float[Tensor, "n d_y"], *, shrinkage: float = 0.0) -> CCA:
    """Canonical correlation analysis with covariances over n:

        C_x^(-1/2) C_xy C_y^(-1/2) = U diag(rho) V^T,   a = (x - mean_x) C_x^(-1/2) U,   b = (y - mean_y) C_y^(-1/2) V

    Without shrinkage the coordinates a and b of the fitting rows have unit variance and rho in [0, 1] are their
    correlations. With it they are not quite: rho may exceed 1.

    Args:
        x: one side of the pairs.
        y: the other, row by row.
        shrinkage: g in [0, 1] of C <- (1 - g) C + g trace(C)/d I, on both sides (ours; arXiv 2410.07610 has none). 0
            needs many more pairs than dimensions; 0.1 to 0.5 is a good start where they are few.

    Raises:
        InputError: the rows cannot be paired, or a covariance cannot be inverted without (more) shrinkage.
    """
    check_pairs(x, y)
    in_range("shrinkage", shrinkage, 0, 1)
    mean_x, mean_y, left, right = _centred(x, y)
    whiten_x, whiten_y = _inverse_root("x", left, shrinkage), _inverse_root("y", right, shrinkage)
    u, rho, vh = torch.linalg.svd(whiten_x @ (left.T @ right / len(x)) @ whiten_y, full_matrices=False)
    parts = (mean_x, mean_y, whiten_x @ u, whiten_y @ vh.T, rho)
    return CCA(*(part.to(x.dtype) for part in parts))


def csa_coordinates(
    rows: Float[Tensor, "m d"],
    mean: Float[Tensor, " d"],
    projection: Float[Tensor, "d r"],
    correlations: Float[Tensor, " r"],
    dims: int,
) -> Float[Tensor, "m dims"]:
    """The first `dims` canonical coordinates as unit rows, each times sqrt(rho).

    Half of rho goes to each side, so that the inner product of the two sides' coordinates is the CSA score
    sum_k rho_k a_k b_k, of arXiv 2410.07610, in [-rho_1, rho_1], and a plain inner-product index reproduces it. Give
    ones for `correlations` to have the cosine.

    Raises:
        InputError: dims is not in [1, r], or a row is not finite.
    """
    check_rows("rows", rows, least=0)
    at_least("dims", dims)
    if dims > len(correlations):
        raise InputError(f"dims is {dims}, and the map has {len(correlations)} canonical directions; give less")
    unit = normalize((rows - mean) @ projection[:, :dims], dim=1)
    return unit * correlations[:dims].sqrt()


def csa_scores(
    cca: CCA, x: Float[Tensor, "m d_x"], y: Float[Tensor, "q d_y"], dims: int, *, weighted: bool = True
) -> Float[Tensor, "m q"]:
    """Score of every row of x with every row of y over the first `dims` canonical coordinates.

    Args:
        cca: what `fit_cca` gave.
        x: rows of the first side.
        y: rows of the second.
        dims: s of the paper, trading information for noise; choose it on held-out pairs.
        weighted: weigh coordinates by their correlations (CSA); otherwise the plain cosine, in [-1, 1].

    Raises:
        InputError: as `csa_coordinates`.
    """
    weights = cca.correlations if weighted else torch.ones_like(cca.correlations)
    left = csa_coordinates(x, cca.mean_x, cca.projection_x, weights, dims)
    return left @ csa_coordinates(y, cca.mean_y, cca.projection_y, weights, dims).T


def fit_ridge(x: Float[Tensor, "n d_x"], y: Float[Tensor, "n d_y"], *, regularisation: float = 0.1) -> LinearMap:
    """Ridge regression y - mean_y ~ (x - mean_x) W with the penalty g trace(X^T X)/d_x ||W||^2, X centred.

    Apply it as (rows - mean_x) @ matrix + mean_y.

    Args:
        x: one side of the pairs.
        y: the other, row by row; give unit rows where cosine matters.
        regularisation: g, at least 0, free of the scale of x. 0 is least squares and needs more pairs than dimensions.

    Raises:
        InputError: the rows cannot be paired, or the problem has no unique solution without regularisation.
    """
    check_pairs(x, y)
    in_range("regularisation", regularisation, 0)
    mean_x, mean_y, left, right = _centred(x, y)
    n, d = left.shape
    wide = n < d
    # (X^T X + g I)^-1 X^T = X^T (X X^T + g I)^-1: the smaller of the two is solved.
    gram = left @ left.T if wide else left.T @ left
    gram.diagonal().add_(regularisation * left.square().sum() / d)
    factor, failed = torch.linalg.cholesky_ex(gram)
    pivots = factor.diagonal().square()
    if failed or (not regularisation and n <= d) or pivots.min() <= _rounding(gram) * pivots.max():
        raise _underdetermined("x", left, "regularisation", regularisation)
    matrix = left.T @ torch.cholesky_solve(right, factor) if wide else torch.cholesky_solve(left.T @ right, factor)
    return LinearMap(*(part.to(x.dtype) for part in (mean_x, mean_y, matrix)))


def fit_procrustes(x: Float[Tensor, "n d_x"], y: Float[Tensor, "n d_y"]) -> LinearMap:
    """The (semi-)orthogonal W that turns centred, normalised rows of x to those of y.

    Apply it as normalise(rows - mean_x) @ matrix, and compare with normalise(rows_y - mean_y).

    Raises:
        InputError: the rows cannot be paired.
    """
    check_pairs(x, y)
    mean_x, mean_y, left, right = _centred(x, y)
    matrix = procrustes(normalize(left, dim=1), normalize(right, dim=1))
    return LinearMap(*(part.to(x.dtype) for part in (mean_x, mean_y, matrix)))


def procrustes(source: Float[Tensor, "n d_x"], target: Float[Tensor, "n d_y"]) -> Float[Tensor, "d_x d_y"]:
    """W = U V^T of source^T target = U S V^T: the W with orthonormal rows or columns that best has target ~ source W.

    Square W are orthogonal (Schoenemann 1966). For d_x < d_y the rows of W are orthonormal, for d_x > d_y the columns;
    W then maximises tr(W^T source^T target). With fewer pairs than dimensions part of W is arbitrary.
    """
    u, _, vh = torch.linalg.svd(source.T @ target, full_matrices=False)
    return u @ vh


def asif_coordinates(
    rows: Float[Tensor, "m d"], anchors: Float[Tensor, "n d"], *, top: int = 800, power: float = 8.0
) -> Float[Tensor, "m n"]:
    """Relative representation of rows by their cosines to n anchors, as unit rows: arXiv 2210.01738.

    Image and text anchors are n pairs; coordinates of an image by the image anchors and of a text by the text anchors
    are compared by inner product. The `top` largest cosines of a row are kept, those below 0 count as 0, each is
    raised to `power`, all else is 0. A row with no positive cosine stays 0.

    Args:
        rows: what to describe.
        anchors: one side of the pairs.
        top: cosines kept per row, 800 in the paper; all where there are fewer anchors.
        power: above 0. The paper's value is given as 8 from memory: UNVERIFIED.

    Raises:
        InputError: top or power is out of range, or a row is not finite.
    """
    check_rows("rows", rows, least=0)
    check_rows("anchors", anchors, least=1)
    at_least("top", top)
    in_range("power", power, 0)
    if not power:
        raise InputError("power is 0, which makes all cosines alike; give a number above 0")
    cosine = normalize(rows, dim=1) @ normalize(anchors, dim=1).T
    largest = cosine.topk(min(top, len(anchors)), dim=1)
    # Relative to the row's largest, so that a high power does not underflow; the norm takes the factor out again.
    kept = largest.values.clamp(min=0)
    kept = (kept / kept[:, :1].clamp(min=torch.finfo(kept.dtype).tiny)).pow(power)
    return normalize(torch.zeros_like(cosine).scatter_(1, largest.indices, kept), dim=1)


def _centred(x: Float[Tensor, "n d_x"], y: Float[Tensor, "n d_y"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both means and both sides around them."""
    mean_x, mean_y = widened(x).mean(0), widened(y).mean(0)
    return mean_x, mean_y, widened(x) - mean_x, widened(y) - mean_y


def _underdetermined(name: str, centred: Float[Tensor, "n d"], remedy: str, value: float) -> InputError:
    if not centred.any():
        return InputError(f"all rows of {name} are the same; give other items")
    n, d = centred.shape
    return InputError(
        f"{name} has {n} rows in {d} dimensions, too few or too alike to determine the map with {remedy} {value:g}; "
        f"give {remedy} above {value:g}, e.g. 0.1, or more pairs"
    )


def _inverse_root(name: str, centred: Float[Tensor, "n d"], shrinkage: float) -> Float[Tensor, "d d"]:
    """C^(-1/2) of the shrunk covariance C."""
    n, d = centred.shape
    covariance = (1 - shrinkage) * (centred.T @ centred) / n
    covariance.diagonal().add_(shrinkage * centred.square().sum() / (n * d))
    values, vectors = torch.linalg.eigh(covariance)
    if (not shrinkage and n <= d) or values[0] <= _rounding(covariance) * values[-1]:
        raise _underdetermined(name, centred, "shrinkage", shrinkage)
    return (vectors / values.sqrt()) @ vectors.T


def _rounding(matrix: Float[Tensor, "d d"]) -> float:
    """What is left of a zero eigenvalue, as a share of the largest."""
    return len(matrix) * torch.finfo(matrix.dtype).eps
