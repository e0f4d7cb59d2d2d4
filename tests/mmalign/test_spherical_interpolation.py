"""Padded Procrustes and interpolation on the sphere against scipy and plane geometry."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmalign.errors import InputError
from mmalign.spherical_interpolation import interpolate_queries, pad_columns, padded_procrustes, slerp

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
WIDTHS = pytest.mark.parametrize(("d_new", "d_old"), [(6, 6), (9, 6), (6, 9)])


def unit(n: int, d: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(n, d, generator=rng, dtype=torch.float64), dim=1).to(dtype)


def turn(d: int, seed: int = 9) -> Tensor:
    return torch.linalg.qr(unit(d, d, seed))[0]


@DTYPES
@WIDTHS
def test_rotation_is_orthogonal_and_scipys(d_new: int, d_old: int, dtype: torch.dtype) -> None:
    # More rows than one chunk.
    new, old = unit(5000, d_new, 1, dtype), unit(5000, d_old, 2, dtype)
    rotation = padded_procrustes(new, old)
    assert rotation.shape == (d_new, max(d_new, d_old))
    assert rotation.dtype == dtype
    atol = 1e-5 if dtype == torch.float32 else 1e-10
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(d_new), atol=atol)
    wide = max(d_new, d_old)
    padded = [np.pad(side.double().numpy(), ((0, 0), (0, wide - side.shape[1]))) for side in (new, old)]
    theirs = scipy.linalg.orthogonal_procrustes(*padded)[0]
    # Beyond d_old the directions are any basis of what is left.
    np.testing.assert_allclose(rotation[:, :d_old], theirs[:d_new, :d_old], atol=atol)


@WIDTHS
def test_a_rotated_model_is_turned_back(d_new: int, d_old: int) -> None:
    narrow = min(d_new, d_old)
    common = unit(50, narrow)
    old = pad_columns(common, d_old)
    new = pad_columns(common, d_new) @ turn(d_new)
    mapped = new @ padded_procrustes(new, old)
    np.testing.assert_allclose(mapped[:, :narrow], common, atol=1e-10)
    np.testing.assert_allclose(mapped[:, narrow:], np.zeros((50, max(d_new, d_old) - narrow)), atol=1e-10)


def test_the_rotation_is_the_best_of_many() -> None:
    new, old = unit(40, 7, 3), unit(40, 5, 4)
    ours = (new @ padded_procrustes(new, old) - pad_columns(old, 7)).norm()
    for seed in range(20):
        assert ours < (new @ turn(7, seed) - pad_columns(old, 7)).norm()


@DTYPES
@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5, 1.0])
def test_slerp_divides_the_angle(alpha: float, dtype: torch.dtype) -> None:
    start, end = unit(20, 4, 5, dtype), unit(20, 4, 6, dtype)
    found = slerp(start, end, alpha)
    assert found.dtype == dtype
    for u, v, q in zip(start.double().numpy(), end.double().numpy(), found.double().numpy(), strict=True):
        theta = math.acos(u @ v)
        side = v - (u @ v) * u
        expected = math.cos(alpha * theta) * u + math.sin(alpha * theta) * side / np.linalg.norm(side)
        np.testing.assert_allclose(q, expected, atol=2e-6 if dtype == torch.float32 else 1e-12)


@DTYPES
@pytest.mark.parametrize("eps", [1e-7, 1e-8, 0.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_identical_and_opposite_rows_stay_unit_rows(alpha: float, eps: float, dtype: torch.dtype) -> None:
    rows = torch.cat([unit(500, 16, 7, dtype), torch.eye(16, dtype=dtype)])
    same = slerp(rows, rows, alpha, eps=eps)
    np.testing.assert_allclose(same, rows, atol=1e-5)
    opposite = slerp(rows, -rows, alpha, eps=eps)
    np.testing.assert_allclose(opposite.norm(dim=1), np.ones(516), atol=1e-5)
    # What is left of two nearly equal terms, so with few digits in float32.
    np.testing.assert_allclose(opposite, rows if alpha <= 0.5 else -rows, atol=1e-3)


def test_slerp_has_a_gradient_for_identical_rows() -> None:
    rows = unit(5, 4, dtype=torch.float32).requires_grad_()
    slerp(rows, rows.detach(), 0.5).sum().backward()
    assert rows.grad is not None
    assert rows.grad.isfinite().all()


def test_half_way_is_the_normalised_mean() -> None:
    old, new = unit(10, 5, 1), unit(10, 8, 2)
    rotation = turn(8)
    found = interpolate_queries(old, new, rotation, 0.5)
    np.testing.assert_allclose(found, normalize(pad_columns(old, 8) + new @ rotation, dim=1), atol=1e-12)
    np.testing.assert_allclose(interpolate_queries(old, new, rotation, 0), pad_columns(old, 8), atol=1e-12)
    np.testing.assert_allclose(interpolate_queries(old, new, rotation, 1), new @ rotation, atol=1e-12)
    assert interpolate_queries(old[:0], new[:0], rotation, 0.5).shape == (0, 8)


def test_wrong_arguments_are_named() -> None:
    new, old = unit(10, 4, 1), unit(10, 6, 2)
    with pytest.raises(InputError, match="x has 10 rows, y 9"):
        padded_procrustes(new, old[1:])
    with pytest.raises(InputError, match=r"query_new has shape \(10, 6\) and rotation \(4, 4\)"):
        interpolate_queries(new, old, torch.eye(4, dtype=torch.float64), 0.5)
    with pytest.raises(InputError, match=r"rows have shape \(10, 6\) and dim is 5"):
        pad_columns(old, 5)
    with pytest.raises(InputError, match=r"alpha is 1.5; give a number in \[0, 1\]"):
        slerp(new, new, 1.5)
    with pytest.raises(InputError, match=r"start has shape \(10, 4\), end \(10, 6\)"):
        slerp(new, old, 0.5)
    broken = new.clone()
    broken[3, 1] = torch.nan
    with pytest.raises(InputError, match="end row 3 holds NaN"):
        slerp(new, broken, 0.5)
