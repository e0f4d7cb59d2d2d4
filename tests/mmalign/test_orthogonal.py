"""Orthogonal layers: where they start, that they stay, which half of the group they keep to, what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal

from mmalign.closed_forms import procrustes
from mmalign.errors import InputError
from mmalign.orthogonal import ORTHOGONAL_MAPS, OrthogonalLinear, orthogonal_weight, skew_exponential

MAPS = pytest.mark.parametrize("orthogonal_map", ORTHOGONAL_MAPS)


def rotation(dim: int, determinant: float, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    q = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))).Q
    if torch.linalg.det(q) * determinant < 0:
        q[0] *= -1
    return q.to(dtype)


@MAPS
@pytest.mark.parametrize("determinant", [1.0, -1.0])
def test_training_stays_orthogonal_and_on_its_side(orthogonal_map: Any, determinant: float) -> None:
    base = rotation(7, determinant)
    layer = OrthogonalLinear(7, orthogonal_map=orthogonal_map, base=base)
    assert torch.equal(layer.weight, base)
    assert torch.equal(layer.bias, torch.zeros(7))
    x, target = torch.randn(2, 30, 7, generator=torch.Generator().manual_seed(1)).unbind()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    losses = []
    for _ in range(60):
        loss = (layer(x) - target).square().mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weight = layer.weight.detach()
    assert losses[-1] < 0.9 * losses[0]
    assert float((weight - base).abs().max()) > 0.1
    np.testing.assert_allclose((weight.T @ weight).numpy(), np.eye(7), atol=2e-5)
    assert float(torch.linalg.det(weight)) == pytest.approx(determinant, abs=1e-4)


@MAPS
def test_it_learns_a_rotation(orthogonal_map: Any) -> None:
    """The least-squares rotation is the Procrustes solution."""
    wanted = skew_exponential(torch.linspace(-0.6, 0.8, 10))
    x = torch.randn(50, 5, generator=torch.Generator().manual_seed(2))
    layer = OrthogonalLinear(5, orthogonal_map=orthogonal_map, base=torch.eye(5), bias=False)
    assert layer.bias is None
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        (layer(x) - x @ wanted.T).square().mean().backward()
        optimizer.step()
    np.testing.assert_allclose(layer.weight.detach().T.numpy(), procrustes(x, x @ wanted.T).numpy(), atol=1e-3)


@MAPS
def test_without_a_base_it_starts_as_torch_does(orthogonal_map: Any) -> None:
    torch.manual_seed(5)
    ours = OrthogonalLinear(6, orthogonal_map=orthogonal_map)
    torch.manual_seed(5)
    theirs = orthogonal(torch.nn.Linear(6, 6), orthogonal_map=orthogonal_map)
    assert torch.equal(ours.weight, theirs.weight)  # type: ignore[arg-type]
    assert torch.equal(ours.bias, theirs.bias)  # type: ignore[arg-type]
    assert [*ours.state_dict()] == [*theirs.state_dict()]


@MAPS
@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4), (1, 3), (1, 1)])
def test_the_function_is_torchs(orthogonal_map: Any, shape: tuple[int, int]) -> None:
    module = torch.nn.Module()
    torch.manual_seed(0)
    module.weight = torch.nn.Parameter(torch.randn(shape, dtype=torch.float64))
    orthogonal(module, orthogonal_map=orthogonal_map)
    parts: Any = module.parametrizations.weight  # type: ignore[union-attr]
    with torch.no_grad():
        parts.original += 0.3 * torch.randn(shape, dtype=torch.float64).tril(-1)
        parts.original.copy_(parts.original.tril(-1) + parts.original.triu(1) - torch.eye(*shape, dtype=torch.float64))
    ours = orthogonal_weight(parts.original, orthogonal_map=orthogonal_map, base=parts[0].base)
    np.testing.assert_allclose(ours.detach().numpy(), module.weight.detach().numpy(), atol=1e-12)  # type: ignore[operator]
    small = ours if shape[0] < shape[1] else ours.T
    np.testing.assert_allclose((small @ small.T).detach().numpy(), np.eye(min(shape)), atol=1e-12)


def test_a_float32_base_that_torch_would_replace_is_kept() -> None:
    """Rounded, it is too far off for torch, which takes its QR factor: other signs, another matrix."""
    base = rotation(40, -1.0, seed=2)
    rounded = (base.double() * (1 + 4e-5)).float()
    layer = OrthogonalLinear(40, base=rounded)
    assert torch.equal(layer.weight, rounded)
    replaced = torch.nn.Linear(40, 40)
    replaced.weight.data = rounded.clone()
    orthogonal(replaced)
    assert float((replaced.weight.detach() - rounded).abs().max()) > 1e-6


def test_base_decides_dtype_and_is_copied() -> None:
    base = rotation(4, 1.0, dtype=torch.float64)
    layer = OrthogonalLinear(4, base=base)
    before = base.clone()
    base.zero_()
    assert torch.equal(layer.weight, before)
    assert layer(torch.ones(1, 4, dtype=torch.float64)).dtype == torch.float64


def test_cached_weight_is_computed_once() -> None:
    layer = OrthogonalLinear(4)
    with parametrize.cached():
        assert layer.weight is layer.weight
    assert layer.weight is not layer.weight


def test_skew_exponential_in_the_plane() -> None:
    angle = 0.7
    turned = skew_exponential(torch.tensor([angle], dtype=torch.float64))
    expected = [[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]
    np.testing.assert_allclose(turned.numpy(), expected, atol=1e-12)


def test_skew_exponential_takes_entries_row_by_row() -> None:
    """To first order exp(P) - I is P itself."""
    small = 1e-6 * torch.arange(1, 7, dtype=torch.float64)
    p = (skew_exponential(small) - torch.eye(4, dtype=torch.float64)).numpy()
    np.testing.assert_allclose(p[np.triu_indices(4, 1)], small.numpy(), rtol=1e-4)
    np.testing.assert_allclose(p, -p.T, atol=1e-10)
    gradient = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(skew_exponential, (gradient,))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: OrthogonalLinear(0), "dim is 0"),
        (lambda: OrthogonalLinear(3, orthogonal_map="qr"), "orthogonal_map is 'qr'; give one of cayley"),  # type: ignore[arg-type]
        (lambda: OrthogonalLinear(3, base=torch.eye(4)), r"base is \(4, 4\) of torch.float32; give \(3, 3\)"),
        (lambda: OrthogonalLinear(3, base=torch.eye(3, dtype=torch.int64)), "of torch.int64"),
        (lambda: OrthogonalLinear(3, base=1.01 * torch.eye(3)), "not orthogonal: an entry of base.T base is 0.02 off"),
        (lambda: OrthogonalLinear(2, base=torch.full((2, 2), torch.nan)), "not orthogonal"),
        (lambda: orthogonal_weight(torch.zeros(3)), r"raw has shape \(3,\)"),
        (lambda: orthogonal_weight(torch.zeros(3, 4), orthogonal_map="qr"), "orthogonal_map"),  # type: ignore[arg-type]
        (lambda: orthogonal_weight(torch.zeros(3, 4), base=torch.eye(3)), r"give \(4, 4\)"),
        (lambda: skew_exponential(torch.zeros(4)), r"upper has shape \(4,\)"),
        (lambda: skew_exponential(torch.zeros(0)), r"upper has shape \(0,\)"),
    ],
)
def test_what_is_refused(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
