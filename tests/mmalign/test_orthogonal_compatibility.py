"""OCA's losses against the formulas written out in numpy, and what each of them may and may not depend on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmalign.errors import InputError
from mmalign.orthogonal import OrthogonalLinear
from mmalign.orthogonal_compatibility import class_prototypes, oca_forward, oca_loss

CLASSES, OLD, DIM, BATCH = 5, 6, 9, 8


def inputs(dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    layer = OrthogonalLinear(DIM, base=torch.linalg.qr(normal(DIM, DIM)).Q)
    with torch.no_grad():
        layer.bias.copy_(normal(DIM))
    return {
        "features": (3 * normal(BATCH, DIM)).to(dtype),
        "labels": torch.randint(CLASSES, (BATCH,), generator=generator),
        "prototypes": (0.4 * normal(CLASSES, OLD)).to(dtype),
        "layer": layer.to(dtype),
        "classifier_weight": normal(CLASSES, DIM).to(dtype),
    }


def smoothed(logits: np.ndarray, labels: np.ndarray, smoothing: float) -> float:
    """(1 - eps) of the label's -log p and eps of the mean over all classes, row by row."""
    total = 0.0
    for row, label in zip(logits, labels, strict=True):
        logs = row - np.log(np.exp(row).sum())
        total += -(1 - smoothing) * logs[label] - smoothing * logs.mean()
    return total / len(labels)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_the_formulas(smoothing: float) -> None:
    given = inputs()
    weights = (2.0, 3.0, 0.5)
    loss = oca_loss(**given, label_smoothing=smoothing, weights=weights)
    f, y, p, w = (given[name].numpy() for name in ("features", "labels", "prototypes", "classifier_weight"))
    q, b = given["layer"].weight.detach().numpy(), given["layer"].bias.detach().numpy()
    h = f / np.linalg.norm(f, axis=1, keepdims=True)
    u = h[:, :OLD] / np.linalg.norm(h[:, :OLD], axis=1, keepdims=True)
    ce = smoothed((h @ q.T + b) @ w.T, y, smoothing)
    bct = smoothed(u @ p.T, y, smoothing)
    cos = np.mean([1 - p[c] @ row / np.linalg.norm(p[c]) for c, row in zip(y, u, strict=True)])
    expected = (2.0 * ce + 3.0 * bct + 0.5 * cos, ce, bct, cos)
    np.testing.assert_allclose([float(term.detach()) for term in loss], expected, rtol=1e-12)


def test_gradients() -> None:
    given = inputs()
    features = given.pop("features").requires_grad_()
    classifier = given.pop("classifier_weight").requires_grad_()
    assert torch.autograd.gradcheck(
        lambda f, c: oca_loss(f, given["labels"], given["prototypes"], given["layer"], c).total, (features, classifier)
    )


def test_compatible_terms_see_the_first_dimensions_and_neither_length_nor_layer() -> None:
    given = inputs()
    before = oca_loss(**given)
    changed = {**given, "features": 7 * given["features"], "layer": lambda rows: rows.flip(1)}
    changed["features"][:, OLD:] = torch.randn(BATCH, DIM - OLD, dtype=torch.float64)
    after = oca_loss(**changed)
    assert float(after.bct - before.bct) == pytest.approx(0, abs=1e-12)
    assert float(after.cos - before.cos) == pytest.approx(0, abs=1e-12)
    assert abs(float((after.ce - before.ce).detach())) > 1e-3


def test_features_on_their_class_means_cost_no_cosine() -> None:
    given = inputs()
    given["features"][:, :OLD] = 5 * given["prototypes"][given["labels"]]
    assert float(oca_loss(**given).cos.detach()) == pytest.approx(0, abs=1e-12)
    given["features"][:, :OLD] *= -1
    assert float(oca_loss(**given).cos.detach()) == pytest.approx(2, abs=1e-12)


def test_half_precision_and_autocast_compute_in_float32() -> None:
    given = inputs(torch.float32)
    exact = oca_loss(**given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(oca_loss(**given).total, exact.total)
    half = oca_loss(**{**given, "features": given["features"].bfloat16()})
    assert half.total.dtype == torch.float32
    assert float(half.total.detach()) == pytest.approx(float(exact.total.detach()), rel=0.02)


def test_forward_of_a_row_of_zeros_is_finite() -> None:
    given = inputs()
    given["features"][0] = 0
    passed = oca_forward(given["features"], given["layer"], given["classifier_weight"], OLD)
    assert all(bool(part.isfinite().all()) for part in passed)
    assert torch.equal(passed.orth_output[0], given["layer"].bias)
    assert passed.bct_feature.shape == (BATCH, OLD)


def test_prototypes_are_means_of_unit_rows() -> None:
    rng = np.random.default_rng(0)
    rows, labels = rng.normal(size=(20, 4)) * rng.uniform(1, 9, size=(20, 1)), np.arange(20) % 3
    found = class_prototypes(torch.from_numpy(rows).float(), torch.from_numpy(labels), 3)
    for c in range(3):
        mean = np.mean([row / np.linalg.norm(row) for row in rows[labels == c]], axis=0)
        np.testing.assert_allclose(found[c].numpy(), mean, atol=1e-6)
        assert np.linalg.norm(found[c]) < 0.99, "not normalised again"
    assert found.dtype == torch.float32


def call_loss(**changed: Any) -> Any:
    return oca_loss(**{**inputs(), **changed})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: call_loss(label_smoothing=1.5), "label_smoothing is 1.5"),
        (lambda: call_loss(weights=(1.0, 2.0)), "give three, of ce, bct and cos"),
        (lambda: call_loss(weights=(1.0, -2.0, 1.0)), "weights is -2"),
        (lambda: call_loss(labels=torch.zeros(3, dtype=torch.int64)), r"labels \(3,\).*give a label a row"),
        (lambda: call_loss(prototypes=torch.zeros(4, OLD)), r"prototypes \(4, 6\)"),
        (lambda: call_loss(prototypes=torch.zeros(CLASSES, DIM + 1)), "rows of the 10 old dimensions or more"),
        (lambda: class_prototypes(torch.zeros(3, 2), torch.tensor([0, 1, 2]), 2), "labels go from 0 to 2"),
        (lambda: class_prototypes(torch.zeros(3, 2), torch.tensor([0, 0, 2]), 3), "class 1 has no row"),
        (lambda: class_prototypes(torch.zeros(3, 2), torch.tensor([0, 1]), 2), "one whole number a row"),
        (lambda: class_prototypes(torch.zeros(2, 2), torch.tensor([0.0, 1.0]), 2), "one whole number a row"),
    ],
)
def test_what_is_refused(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
