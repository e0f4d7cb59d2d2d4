"""Dispersion losses against loops over pairs, and what they do to points on a sphere."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mmalign.dispersion import inter_dispersion, intra_dispersion
from mmalign.errors import InputError

LABELS = torch.tensor([3, 1, 3, 1, 7, 3])


def points() -> Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def unit_lists(rows: Tensor) -> list[list[float]]:
    return [[x / math.hypot(*row) for x in row] for row in rows.tolist()]


@pytest.mark.parametrize("labels", [None, LABELS], ids=["all", "labels"])
def test_inter_by_hand(labels: Tensor | None) -> None:
    unit, names = unit_lists(points()), list(range(6)) if labels is None else labels.tolist()
    values = [
        math.exp(-1.5 * math.dist(unit[i], unit[j]) ** 2) for i in range(6) for j in range(6) if names[i] != names[j]
    ]
    assert inter_dispersion(points(), labels=labels, t=1.5).item() == pytest.approx(sum(values) / len(values))


def test_intra_by_hand() -> None:
    unit, total = unit_lists(points()), 0.0
    for i, label in enumerate(LABELS.tolist()):
        members = [unit[j] for j in range(6) if LABELS[j] == label]
        centre = [sum(column) / len(members) for column in zip(*members, strict=True)]
        total += math.dist(unit[i], centre) ** 2
    assert intra_dispersion(points(), LABELS).item() == pytest.approx(total / 6)


def test_gradcheck() -> None:
    rows = points().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: inter_dispersion(x, labels=LABELS), rows)
    assert torch.autograd.gradcheck(lambda x: intra_dispersion(x, LABELS), rows)


def test_descent_pushes_apart_and_pulls_together() -> None:
    def descend(loss, rows: Tensor) -> Tensor:
        for _ in range(200):
            rows = rows.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(loss(rows), rows)
            rows = rows - 5 * gradient
        return torch.nn.functional.normalize(rows.detach(), dim=1)

    apart = descend(inter_dispersion, points()[:3])
    cosines = (apart @ apart.T)[~torch.eye(3, dtype=torch.bool)]
    torch.testing.assert_close(cosines, torch.full((6,), -0.5, dtype=torch.float64), atol=0.02, rtol=0)  # a triangle
    together = descend(lambda rows: intra_dispersion(rows, torch.zeros(6, dtype=torch.long)), points())
    assert (together @ together.T).min() > 0.99


def test_nothing_to_compare_is_zero_with_zero_gradient() -> None:
    for rows, loss in (
        (points()[:1], inter_dispersion),
        (points(), lambda x: inter_dispersion(x, labels=torch.zeros(6, dtype=torch.long))),
        (points()[:1], lambda x: intra_dispersion(x, torch.tensor([4]))),
        (points(), lambda x: intra_dispersion(x, torch.arange(6))),
    ):
        rows.requires_grad_()
        value = loss(rows)
        value.backward()
        assert value == 0
        torch.testing.assert_close(rows.grad, torch.zeros_like(rows), atol=1e-15, rtol=0)


def test_limits_and_scale() -> None:
    same = torch.ones(4, 3)
    assert inter_dispersion(same).item() == pytest.approx(1)
    opposite = torch.tensor([[1.0, 0.0], [-2.0, 0.0]])
    assert inter_dispersion(opposite, t=0.5).item() == pytest.approx(math.exp(-2))
    assert intra_dispersion(opposite, torch.zeros(2, dtype=torch.long)).item() == pytest.approx(1)
    assert inter_dispersion(opposite.bfloat16()).dtype == torch.float32


def test_refusals() -> None:
    with pytest.raises(InputError, match="t is 0"):
        inter_dispersion(points(), t=0.0)
    with pytest.raises(InputError, match="one for each of the 6 rows"):
        inter_dispersion(points(), labels=LABELS[:4])
    with pytest.raises(InputError, match="one for each of the 6 rows"):
        intra_dispersion(points(), LABELS[:4])
    with pytest.raises(InputError, match="give a matrix"):
        inter_dispersion(points()[0])
