"""Kernel alignment's losses by hand and by their properties; the published numbers are in tests/golden."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from sklearn.metrics.pairwise import cosine_similarity, polynomial_kernel, rbf_kernel
from torch import Tensor

from mmalign.errors import InputError
from mmalign.kernel_alignment import (
    CosineKernel,
    GaussianKernel,
    PolynomialKernel,
    cosine_shift_bound,
    fit_kernel_offset,
    kernel_alignment_loss,
    kernel_matrix,
    median_distance,
    nearest_pairs_error,
    teacher_kernel,
)

KERNELS = [PolynomialKernel(0.7, 0.2), PolynomialKernel(0.1, 0.4, 2), GaussianKernel(1.7), CosineKernel()]


def rows(n: int, dim: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_kernels_are_those_of_scikit_learn() -> None:
    x, y = rows(5, 7), rows(4, 7, 1)
    raw = [polynomial_kernel(a, b, degree=3, gamma=0.2, coef0=0.7) for a, b in ((x, y), (x, x), (y, y))]
    expected = raw[0] / (raw[1].diagonal()[:, None] * raw[2].diagonal()[None]) ** 0.5
    found = kernel_matrix(x, PolynomialKernel(0.7, 0.2), y)
    torch.testing.assert_close(found, torch.from_numpy(expected))
    torch.testing.assert_close(
        kernel_matrix(x, GaussianKernel(1.7), y), torch.from_numpy(rbf_kernel(x, y, 1 / (2 * 1.7**2)))
    )
    torch.testing.assert_close(kernel_matrix(x, CosineKernel(), y), torch.from_numpy(cosine_similarity(x, y)))
    torch.testing.assert_close(kernel_matrix(x, KERNELS[0])[:2, 2:], kernel_matrix(x[:2], KERNELS[0], x[2:]))


@pytest.mark.parametrize("kernel", KERNELS, ids=repr)
def test_kernel_matrices(kernel: Any) -> None:
    x = rows(9, 6)
    found = kernel_matrix(x, kernel)
    torch.testing.assert_close(found, found.T)
    torch.testing.assert_close(found.diagonal(), torch.ones(9, dtype=x.dtype))
    assert torch.linalg.eigvalsh(found).min() > -1e-12
    turned = x @ torch.linalg.qr(rows(6, 6, 3)).Q
    torch.testing.assert_close(kernel_matrix(turned, kernel), found)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = kernel_matrix(x.float(), kernel)
    torch.testing.assert_close(narrow, found.float(), rtol=0, atol=1e-5)


def test_only_the_ratio_of_offset_and_gamma_counts() -> None:
    x, z0, t = rows(6, 5), rows(6, 5, 1), rows(6, 8, 2)
    gamma, offset = (torch.tensor(value, dtype=x.dtype, requires_grad=True) for value in (0.2, 0.7))
    loss = kernel_alignment_loss(x, z0, t, PolynomialKernel(offset, gamma), teacher_kernel(8))
    more = kernel_alignment_loss(x, z0, t, PolynomialKernel(7 * offset, 7 * gamma), teacher_kernel(8))
    torch.testing.assert_close(loss.student, more.student)
    by_gamma, by_offset = torch.autograd.grad(loss.total, [gamma, offset])
    assert abs(float(by_gamma)) > 1e-3
    assert 0.2 * float(by_gamma) + 0.7 * float(by_offset) == pytest.approx(0, abs=1e-12)


def test_the_same_network_on_both_sides_has_nothing_to_learn() -> None:
    x = rows(6, 5).requires_grad_()
    for kernel in KERNELS:
        loss = kernel_alignment_loss(x, x.detach(), x.detach(), kernel, kernel)
        (gradient,) = torch.autograd.grad(loss.total, x)
        assert float(loss.total.detach()) == pytest.approx(0, abs=1e-24)
        assert gradient.abs().max() < 1e-12


def test_terms_and_weights() -> None:
    z, z0, t = rows(4, 5), rows(4, 5, 1), rows(4, 8, 2)
    found = kernel_alignment_loss(z, z0, t, CosineKernel(), teacher_kernel(8), weight=0.25, reg_weight=3.0)
    assert float(found.reg) == pytest.approx(sum(float((a - b).norm() ** 2) for a, b in zip(z, z0, strict=True)) / 4)
    pairs = [(found.student[i, j] - found.teacher[i, j]) ** 2 for i in range(4) for j in range(4)]
    assert float(found.align) == pytest.approx(float(sum(pairs)) / 16)
    assert float(found.total) == pytest.approx(3 * float(found.reg) + 0.25 * float(found.align))


def test_batches_without_their_diagonal_estimate_the_whole_set() -> None:
    """Over all batches of three of six images, the mean is that of the set; and so is the gradient's."""
    z, z0, t = rows(6, 5).requires_grad_(), rows(6, 5, 1), rows(6, 8, 2)
    kernels = PolynomialKernel(0.7), teacher_kernel(8)

    def loss(chosen: list[int], diagonal: bool) -> Tensor:
        return kernel_alignment_loss(z[chosen], z0[chosen], t[chosen], *kernels, diagonal=diagonal).total

    batches = [list(batch) for batch in itertools.combinations(range(6), 3)]
    mean = torch.stack([loss(batch, False) for batch in batches]).mean()
    whole = loss(list(range(6)), False)
    torch.testing.assert_close(mean, whole)
    torch.testing.assert_close(torch.autograd.grad(mean, z), torch.autograd.grad(whole, z))
    with_diagonal = kernel_alignment_loss(z, z0, t, *kernels)
    without = kernel_alignment_loss(z, z0, t, *kernels, diagonal=False)
    torch.testing.assert_close(with_diagonal.align, without.align * 5 / 6)


def test_the_offset_that_made_a_kernel_is_found_again() -> None:
    x = rows(40, 6) * 5
    wanted = PolynomialKernel(59.88, 1.0)
    assert fit_kernel_offset(x, x, teacher_kernel=wanted) == pytest.approx(59.88, rel=1e-3)
    grid = [0.1 * 1.3**step for step in range(40)]
    t = rows(40, 8, 1)

    def error(offset: float) -> float:
        difference = kernel_matrix(x, PolynomialKernel(offset)) - kernel_matrix(t, teacher_kernel(8))
        return float(difference.square().mean())

    best = fit_kernel_offset(x, t, teacher_kernel=teacher_kernel(8))
    assert error(best) <= min(map(error, grid)) + 1e-9


def test_the_median_pair_has_the_kernel_that_it_should() -> None:
    x = rows(6, 4)
    found = kernel_matrix(x, GaussianKernel(median_distance(x)))
    assert float(found[torch.triu_indices(6, 6, 1).unbind()].median()) == pytest.approx(math.exp(-0.5))
    with pytest.raises(InputError, match="half of the pairs"):
        median_distance(torch.ones(4, 2))


def test_nearest_pairs() -> None:
    teacher = kernel_matrix(rows(8, 3), CosineKernel())
    student = kernel_matrix(rows(8, 3, 1), CosineKernel())
    pairs = sorted(((float(teacher[i, j]), i, j) for i in range(8) for j in range(i)), reverse=True)[:7]
    expected = sum(float(student[i, j] - teacher[i, j]) ** 2 for _, i, j in pairs) / 7
    assert float(nearest_pairs_error(student, teacher, 0.25)) == pytest.approx(expected)
    assert float(nearest_pairs_error(student, teacher, 1e-6)) == pytest.approx(
        float(student[pairs[0][1], pairs[0][2]] - teacher[pairs[0][1], pairs[0][2]]) ** 2
    )


def test_no_text_moves_further_than_the_bound() -> None:
    z0, texts = rows(30, 4), rows(2000, 4, 1)
    z = z0 + 0.3 * rows(30, 4, 2)
    moved = (cosine_similarity(z, texts) - cosine_similarity(z0, texts)).__abs__().max(axis=1)
    bound = cosine_shift_bound(z, z0)
    assert (torch.from_numpy(moved) <= bound).all()
    assert (torch.from_numpy(moved) > 0.3 * bound).any()


def test_the_penalty_keeps_features_where_they_are() -> None:
    """A tower learns towards the teacher's kernel; without the penalty it leaves the text side behind."""
    images = rows(24, 10)
    t = images @ rows(10, 8, 1)  # what a tower can learn
    cosines, aligned = {}, {}
    for reg_weight in (1.0, 0.0):
        tower = torch.nn.Linear(10, 6, dtype=torch.float64)
        with torch.no_grad():
            tower.weight.copy_(rows(6, 10, 2))
        z0 = tower(images).detach()
        kernel = PolynomialKernel(fit_kernel_offset(z0, t, teacher_kernel=teacher_kernel(8)))
        optimizer = torch.optim.Adam(tower.parameters(), lr=0.02)
        losses = []
        for _ in range(150):
            loss = kernel_alignment_loss(tower(images), z0, t, kernel, teacher_kernel(8), weight=200,
                                         reg_weight=reg_weight)  # fmt: skip
            optimizer.zero_grad()
            loss.total.backward()
            optimizer.step()
            losses.append(float(loss.align))
        cosines[reg_weight] = float(torch.cosine_similarity(tower(images), z0).mean())
        aligned[reg_weight] = losses[-1] / losses[0]
    assert aligned[1.0] < 0.75
    assert cosines[1.0] > 0.95
    assert cosines[0.0] < 0.9


def test_what_is_refused() -> None:
    x, t = rows(4, 5), rows(4, 8)
    with pytest.raises(InputError, match=r"student has shape \(4, 5\), original \(4, 6\)"):
        kernel_alignment_loss(x, rows(4, 6), t, CosineKernel(), CosineKernel())
    with pytest.raises(InputError, match="two images or more"):
        kernel_alignment_loss(x[:1], x[:1], t[:1], CosineKernel(), CosineKernel())
    with pytest.raises(InputError, match="weight is -1"):
        kernel_alignment_loss(x, x, t, CosineKernel(), CosineKernel(), weight=-1)
    with pytest.raises(InputError, match=r"offset is -0\.1"):
        PolynomialKernel(-0.1)
    with pytest.raises(InputError, match="sigma is 0"):
        GaussianKernel(0.0)
    with pytest.raises(InputError, match="4 student rows and 3"):
        fit_kernel_offset(x, t[:3], teacher_kernel=CosineKernel())
    with pytest.raises(InputError, match="share is 2"):
        nearest_pairs_error(x[:, :4], x[:, :4], 2)
    assert math.isfinite(float(kernel_alignment_loss(x, x, t, GaussianKernel(1e-3), CosineKernel()).total))
