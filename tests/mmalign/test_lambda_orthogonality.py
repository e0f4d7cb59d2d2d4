"""Lambda-orthogonality and its objective against loops, numerical gradients and torch's own losses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss, normalize

from mmalign.errors import InputError
from mmalign.lambda_orthogonality import (
    compatibility_objective,
    lambda_orthogonality,
    relative_threshold,
    supervised_contrastive,
)

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@DTYPES
@pytest.mark.parametrize(("shape", "threshold", "sharpness"), [((5, 5), 3.0, 2.0), ((3, 7), 0.0, 10.0)])
def test_penalty_is_the_sum_over_entries(
    shape: tuple[int, int], threshold: float, sharpness: float, dtype: torch.dtype
) -> None:
    weight = random(*shape, dtype=dtype)
    rows = weight.double().numpy()
    squares = sum((float(a @ b) - (i == j)) ** 2 for i, a in enumerate(rows) for j, b in enumerate(rows))
    deviation = squares**0.5
    expected = deviation / (1 + math.exp(-sharpness * (deviation - threshold)))
    found = lambda_orthogonality(weight, threshold, sharpness)
    assert found.dtype == dtype
    assert float(found) == pytest.approx(expected, rel=1e-5 if dtype == torch.float32 else 1e-12)


def test_gradient_is_the_slope() -> None:
    weight = random(4, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: lambda_orthogonality(w, 3.0, 0.7), weight)


@DTYPES
@pytest.mark.parametrize("rows", [6, 4])
def test_gradient_is_zero_where_exactly_orthogonal(rows: int, dtype: torch.dtype) -> None:
    weight = torch.eye(6, dtype=dtype)[:rows].requires_grad_()
    loss = lambda_orthogonality(weight, 0.5, 10.0)
    loss.backward()
    assert float(loss.detach()) == 0
    assert weight.grad is not None
    assert not weight.grad.any()


def test_half_precision_is_widened() -> None:
    assert lambda_orthogonality(random(5, 5).bfloat16(), 1.0).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = lambda_orthogonality(random(5, 5, dtype=torch.float32), 1.0)
    assert inside == lambda_orthogonality(random(5, 5, dtype=torch.float32), 1.0)


def test_threshold_of_the_paper_in_other_sizes() -> None:
    assert relative_threshold(12 / math.sqrt(512), 512) == pytest.approx(12)
    assert relative_threshold(0.5, 64) == 4


def test_the_threshold_holds_only_where_the_switch_is_sharp() -> None:
    """Descent from above stops near lambda for a large alpha lambda, and goes on to N = 0 for a small one."""
    ends = []
    for sharpness in (10.0, 0.3):
        weight = (1.5 * torch.eye(16, dtype=torch.float64)).requires_grad_()
        optimiser = torch.optim.SGD([weight], lr=0.01)
        for _ in range(800):
            optimiser.zero_grad()
            lambda_orthogonality(weight, 2.0, sharpness).backward()
            optimiser.step()
        ends.append(float((weight @ weight.T - torch.eye(16)).detach().norm()))
    assert 1 < ends[0] < 2
    assert ends[1] < 0.2


@DTYPES
@pytest.mark.parametrize("with_labels", [True, False])
def test_contrastive_is_a_loop(with_labels: bool, dtype: torch.dtype) -> None:
    anchors, candidates = random(12, 5, seed=1, dtype=dtype), random(12, 5, seed=2, dtype=dtype)
    labels = torch.arange(12) % 4 if with_labels else None
    found = supervised_contrastive(anchors, candidates, labels, 0.2)
    total = 0.0
    for i in range(12):
        a = anchors[i].double().numpy()
        cosines = [float(a @ c / np.linalg.norm(a) / np.linalg.norm(c)) for c in candidates.double().numpy()]
        log_sum = math.log(sum(math.exp(c / 0.2) for c in cosines))
        positives = [j for j in range(12) if (i % 4 == j % 4 if with_labels else i == j)]
        total -= sum(cosines[j] / 0.2 - log_sum for j in positives) / len(positives)
    assert float(found) == pytest.approx(total / 12, rel=1e-5 if dtype == torch.float32 else 1e-12)


def test_without_labels_is_infonce() -> None:
    a, c = random(9, 4, seed=1), random(9, 4, seed=2)
    expected = cross_entropy(normalize(a) @ normalize(c).T / 0.07, torch.arange(9))
    assert float(supervised_contrastive(a, c)) == pytest.approx(float(expected))
    alone = supervised_contrastive(a, c, torch.arange(9) * 3)
    assert float(alone) == pytest.approx(float(expected))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_objective_is_the_sum_of_its_parts(reduction: str) -> None:
    old, backward_new, forward_old = (random(10, 6, seed=seed) for seed in range(3))
    labels, weight = torch.arange(10) % 3, random(6, 6, seed=4)
    found = compatibility_objective(
        old, backward_new, forward_old, weight=weight, labels=labels, threshold=2.0, sharpness=3.0, temperature=0.3,
        weights=(2.0, 3.0, 5.0), reduction=reduction,  # type: ignore[arg-type]
    )  # fmt: skip
    times = 6 if reduction == "sum" else 1
    assert float(found.forward) == pytest.approx(times * float(mse_loss(forward_old, backward_new)))
    assert float(found.backward) == pytest.approx(times * float(mse_loss(backward_new, old)))
    assert found.contrastive_new == supervised_contrastive(forward_old, backward_new, labels, 0.3)
    assert found.contrastive_old == supervised_contrastive(forward_old, old, labels, 0.3)
    assert found.contrastive == found.contrastive_new + found.contrastive_old
    assert found.orthogonality == lambda_orthogonality(weight, 2.0, 3.0)
    total = 2 * found.forward + 3 * found.backward + 5 * found.contrastive + found.orthogonality
    assert float(found.total) == pytest.approx(float(total))
    assert compatibility_objective(old, backward_new, forward_old).orthogonality == 0


def test_wrong_arguments_are_named() -> None:
    rows, square = random(10, 6), random(6, 6)
    with pytest.raises(InputError, match="threshold is -1; give 0 or more"):
        lambda_orthogonality(square, -1.0)
    with pytest.raises(InputError, match="sharpness is 0"):
        lambda_orthogonality(square, 1.0, 0.0)
    with pytest.raises(InputError, match=r"weight has shape \(10,\)"):
        lambda_orthogonality(rows[:, 0], 1.0)
    with pytest.raises(InputError, match=r"lambda_rel is -0\.5"):
        relative_threshold(-0.5, 4)
    with pytest.raises(InputError, match="temperature is 0"):
        supervised_contrastive(rows, rows, None, 0.0)
    with pytest.raises(InputError, match=r"anchors have shape \(10, 6\), candidates \(9, 6\)"):
        supervised_contrastive(rows, rows[1:])
    with pytest.raises(InputError, match=r"labels have shape \(9,\)"):
        supervised_contrastive(rows, rows, torch.arange(9))
    with pytest.raises(InputError, match=r"old has shape \(10, 6\), backward_new \(10, 5\)"):
        compatibility_objective(rows, rows[:, 1:], rows)
    with pytest.raises(InputError, match="reduction is 'none'; give one of sum, mean"):
        compatibility_objective(rows, rows, rows, reduction="none")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="the weight of L_B is -1"):
        compatibility_objective(rows, rows, rows, weights=(1.0, -1.0, 1.0))
    with pytest.raises(InputError, match=r"weights are \(1\.0, 1\.0\); give three"):
        compatibility_objective(rows, rows, rows, weights=(1.0, 1.0))  # type: ignore[arg-type]
