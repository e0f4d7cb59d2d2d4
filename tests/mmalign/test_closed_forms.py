"""Closed forms against scipy, scikit-learn and plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.cross_decomposition import CCA as SklearnCCA
from sklearn.linear_model import Ridge
from torch import Tensor
from torch.nn.functional import normalize

from mmalign.closed_forms import (
    asif_coordinates,
    csa_coordinates,
    csa_scores,
    fit_cca,
    fit_procrustes,
    fit_ridge,
    procrustes,
)
from mmalign.errors import InputError

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def pairs(n: int = 120, d_x: int = 8, d_y: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    shared = torch.randn(n, 3, generator=rng, dtype=torch.float64)
    return [
        (shared @ torch.randn(3, d, generator=rng, dtype=torch.float64)
         + torch.randn(n, d, generator=rng, dtype=torch.float64) + shift).to(dtype)
        for d, shift in ((d_x, 0.4), (d_y, -2))
    ]  # fmt: skip


@pytest.mark.parametrize("shrinkage", [0.0, 0.3])
def test_cca_solves_the_generalised_eigenproblem(shrinkage: float) -> None:
    x, y = pairs()
    fitted = fit_cca(x, y, shrinkage=shrinkage)
    left, right = ((rows - rows.mean(0)).numpy() for rows in (x, y))
    within = []
    for rows in (left, right):
        c = rows.T @ rows / len(rows)
        within.append((1 - shrinkage) * c + shrinkage * np.trace(c) / len(c) * np.eye(len(c)))
    across = left.T @ right / len(left)
    # C_xy C_y^-1 C_yx w = rho^2 C_x w
    values, vectors = scipy.linalg.eigh(across @ np.linalg.solve(within[1], across.T), within[0])
    order = np.argsort(-values)[: len(fitted.correlations)]
    np.testing.assert_allclose(fitted.correlations, np.sqrt(values[order]), rtol=1e-9)
    wanted = left @ vectors[:, order]
    ours = ((x - fitted.mean_x) @ fitted.projection_x).numpy()
    np.testing.assert_allclose(np.abs(ours), np.abs(wanted), atol=1e-8)
    for projection, c in ((fitted.projection_x, within[0]), (fitted.projection_y, within[1])):
        np.testing.assert_allclose(projection.T.numpy() @ c @ projection.numpy(), np.eye(5), atol=1e-9)
    np.testing.assert_allclose(
        fitted.projection_x.T.numpy() @ across @ fitted.projection_y.numpy(), np.diag(fitted.correlations), atol=1e-9
    )


def test_cca_agrees_with_scikit_learn() -> None:
    x, y = pairs()
    fitted = fit_cca(x, y)
    theirs = SklearnCCA(n_components=3, scale=False, max_iter=5000, tol=1e-12).fit_transform(x.numpy(), y.numpy())
    wanted = [np.corrcoef(a, b)[0, 1] for a, b in zip(theirs[0].T, theirs[1].T, strict=True)]
    np.testing.assert_allclose(fitted.correlations[:3], wanted, rtol=1e-6)


@DTYPES
def test_csa_score_is_the_weighted_cosine(dtype: torch.dtype) -> None:
    x, y = pairs(dtype=dtype)
    fitted = fit_cca(x, y, shrinkage=0.1)
    assert {part.dtype for part in fitted} == {dtype}
    scores, cosines = csa_scores(fitted, x[:6], y[:4], 3), csa_scores(fitted, x[:6], y[:4], 3, weighted=False)
    assert scores.dtype == dtype
    for i in range(6):
        for j in range(4):
            a = (x[i] - fitted.mean_x) @ fitted.projection_x[:, :3]
            b = (y[j] - fitted.mean_y) @ fitted.projection_y[:, :3]
            terms = (a / a.norm()) * (b / b.norm())
            assert float(scores[i, j]) == pytest.approx(float((fitted.correlations[:3] * terms).sum()), abs=1e-5)
            assert float(cosines[i, j]) == pytest.approx(float(terms.sum()), abs=1e-5)


def test_cca_with_few_pairs_wants_shrinkage() -> None:
    x, y = pairs(n=8)
    with pytest.raises(InputError, match=r"x has 8 rows in 8 dimensions.*give shrinkage above 0"):
        fit_cca(x, y)
    assert fit_cca(x, y, shrinkage=0.1).correlations.isfinite().all()
    x, y = pairs()
    y[:, 4] = y[:, 0] - y[:, 1]
    with pytest.raises(InputError, match="y has 120 rows in 5 dimensions, too few or too alike"):
        fit_cca(x, y)
    with pytest.raises(InputError, match="all rows of y are the same"):
        fit_cca(x, torch.ones_like(y), shrinkage=0.5)


def test_shrinkage_helps_where_pairs_are_few() -> None:
    train, held_out = [side[:12] for side in pairs(n=112)], [side[12:] for side in pairs(n=112)]

    def first_found(shrinkage: float) -> float:
        scores = csa_scores(fit_cca(*train, shrinkage=shrinkage), *held_out, 3)
        return float((scores.diagonal().unsqueeze(1) >= scores).double().mean())

    assert first_found(0.3) > first_found(0.0)


@DTYPES
@pytest.mark.parametrize(("n", "regularisation"), [(120, 0.0), (120, 0.1), (5, 0.1)])
def test_ridge_agrees_with_scikit_learn(n: int, regularisation: float, dtype: torch.dtype) -> None:
    x, y = pairs(n=n, dtype=dtype)
    fitted = fit_ridge(x, y, regularisation=regularisation)
    assert {part.dtype for part in fitted} == {dtype}
    wide = x.double() - x.double().mean(0)
    theirs = Ridge(alpha=regularisation * float((wide**2).sum()) / 8, solver="svd").fit(x.double(), y.double())
    ours = (x - fitted.mean_x) @ fitted.matrix + fitted.mean_y
    tolerance = 1e-4 if dtype == torch.float32 else 1e-9
    np.testing.assert_allclose(fitted.matrix.T, theirs.coef_, atol=tolerance)
    np.testing.assert_allclose(ours, theirs.predict(x.double()), atol=tolerance)


def test_ridge_does_not_depend_on_the_scale_of_x() -> None:
    x, y = pairs()
    np.testing.assert_allclose(fit_ridge(x, y).matrix, 100 * fit_ridge(100 * x, y).matrix, rtol=1e-9)


def test_ridge_without_regularisation_needs_pairs() -> None:
    x, y = pairs(n=8)
    with pytest.raises(InputError, match=r"x has 8 rows in 8 dimensions.*give regularisation above 0"):
        fit_ridge(x, y, regularisation=0)
    x, y = pairs()
    x[:, 7] = x[:, 0]
    with pytest.raises(InputError, match="too alike"):
        fit_ridge(x, y, regularisation=0)
    assert fit_ridge(x, y).matrix.isfinite().all()


def test_procrustes_agrees_with_scipy() -> None:
    x, y = pairs(d_y=8)
    np.testing.assert_allclose(procrustes(x, y), scipy.linalg.orthogonal_procrustes(x, y)[0], atol=1e-10)


@pytest.mark.parametrize(("d_x", "d_y"), [(4, 7), (7, 4)])
def test_procrustes_of_different_widths_is_the_best_semi_orthogonal_map(d_x: int, d_y: int) -> None:
    x, y = pairs(d_x=d_x, d_y=d_y)
    ours = procrustes(x, y)
    assert ours.shape == (d_x, d_y)
    small = ours @ ours.T if d_x < d_y else ours.T @ ours
    np.testing.assert_allclose(small, np.eye(4), atol=1e-12)
    wide = max(d_x, d_y)
    padded = [torch.nn.functional.pad(side, (0, wide - side.shape[1])) for side in (x, y)]
    np.testing.assert_allclose(ours, scipy.linalg.orthogonal_procrustes(*padded)[0][:d_x, :d_y], atol=1e-10)
    rng = torch.Generator().manual_seed(1)
    for _ in range(20):
        other = torch.linalg.qr(torch.randn(7, 4, generator=rng, dtype=torch.float64))[0]
        other = other if d_x > d_y else other.T
        assert (other * (x.T @ y)).sum() < (ours * (x.T @ y)).sum()


@DTYPES
def test_fitted_procrustes_finds_a_rotation(dtype: torch.dtype) -> None:
    x, _ = pairs(dtype=dtype)
    turn = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1), dtype=dtype))[0]
    y = 3 * (x @ turn) + 5
    fitted = fit_procrustes(x, y)
    assert {part.dtype for part in fitted} == {dtype}
    np.testing.assert_allclose(fitted.matrix, turn, atol=1e-4 if dtype == torch.float32 else 1e-9)
    mapped = normalize(x - fitted.mean_x, dim=1) @ fitted.matrix
    np.testing.assert_allclose(mapped, normalize(y - fitted.mean_y, dim=1), atol=1e-4)


@DTYPES
@pytest.mark.parametrize(("top", "power"), [(4, 8.0), (4, 1.0), (800, 3.0), (1, 60.0)])
def test_asif_is_a_loop_over_anchors(top: int, power: float, dtype: torch.dtype) -> None:
    rows, anchors = (torch.randn(n, 5, generator=torch.Generator().manual_seed(n), dtype=dtype) for n in (6, 15))
    ours = asif_coordinates(rows, anchors, top=top, power=power)
    assert ours.dtype == dtype
    for row, found in zip(rows.double(), ours, strict=True):
        cosines = [float(row @ anchor / (row.norm() * anchor.norm())) for anchor in anchors.double()]
        kept = sorted(range(15), key=lambda i: -cosines[i])[:top]
        raised = np.array([max(cosines[i], 0) ** power if i in kept else 0 for i in range(15)])
        np.testing.assert_allclose(found, raised / np.linalg.norm(raised), atol=1e-5)


def test_asif_row_without_a_positive_cosine_is_zero() -> None:
    anchors = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    coordinates = asif_coordinates(torch.tensor([[-1.0, 0.0], [0.01, -1.0]]), anchors, power=20)
    np.testing.assert_allclose(coordinates, [[0, 0], [1, 0]], atol=1e-6)


def test_wrong_arguments_are_named() -> None:
    x, y = pairs()
    fitted = fit_cca(x, y)
    with pytest.raises(InputError, match=r"shrinkage is 2; give a number in \[0, 1\]"):
        fit_cca(x, y, shrinkage=2)
    with pytest.raises(InputError, match="regularisation is -1"):
        fit_ridge(x, y, regularisation=-1)
    with pytest.raises(InputError, match="dims is 6, and the map has 5"):
        csa_coordinates(x, fitted.mean_x, fitted.projection_x, fitted.correlations, 6)
    with pytest.raises(InputError, match="power is 0"):
        asif_coordinates(x, x, power=0)
    with pytest.raises(InputError, match="top is 0"):
        asif_coordinates(x, x, top=0)
    for fit in (fit_cca, fit_ridge, fit_procrustes):
        with pytest.raises(InputError, match="x has 120 rows, y 119"):
            fit(x, y[1:])
