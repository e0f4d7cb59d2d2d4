"""Compatibility of models against counting by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mmalign.errors import InputError
from mmalign.metrics import compatibility, flip_rates, update_gain


def test_small_matrix_by_hand() -> None:
    # 1 on 0: better than 0 on 0. 2 on 0: equal, so not compatible. 2 on 1: better.
    matrix = np.array([[0.5, 7, np.nan], [0.6, 0.7, -3], [0.5, 0.8, 0.9]])
    found = compatibility(matrix)
    assert found.incompatible.tolist() == [[False] * 3, [False] * 3, [True, False, False]]
    assert found.average_compatibility == pytest.approx(2 / 3)
    np.testing.assert_allclose(found.prefix_compatibility, [1, 2 / 3])
    np.testing.assert_allclose(found.prefix_accuracy, [50, 60, 100 * 4 / 6])
    assert found.average_accuracy == pytest.approx(400 / 6)


def test_prefixes_are_the_smaller_matrices() -> None:
    matrix = np.random.default_rng(0).uniform(size=(6, 6))
    whole = compatibility(matrix)
    for models in range(2, 7):
        part = compatibility(matrix[:models, :models])
        better = [matrix[i, j] > matrix[j, j] for i in range(models) for j in range(i)]
        entries = [matrix[i, j] for i in range(models) for j in range(i + 1)]
        assert part.average_compatibility == pytest.approx(np.mean(better))
        assert part.average_accuracy == pytest.approx(100 * np.mean(entries))
        assert whole.prefix_compatibility[models - 2] == pytest.approx(part.average_compatibility)
        assert whole.prefix_accuracy[models - 1] == pytest.approx(part.average_accuracy)


@pytest.mark.parametrize("value", [0.0, 0.004, 1.0])
def test_scale_is_not_guessed(value: float) -> None:
    """Zeros count, and neither tiny nor perfect values change the scale."""
    found = compatibility(np.full((3, 3), value))
    assert found.average_accuracy == pytest.approx(100 * value)
    assert found.average_compatibility == 0


def test_flips() -> None:
    old, new = np.array([1, 1, 1, 0, 0, 0, 0, 1], bool), np.array([1, 0, 1, 1, 1, 1, 0, 1], bool)
    rates = flip_rates(old, new)
    assert rates == (3 / 8, 1 / 8)
    assert rates.positive - rates.negative == pytest.approx(new.mean() - old.mean())
    assert flip_rates(old.astype(float), new.astype(int)) == rates
    assert flip_rates(old, old) == (0, 0)


def test_gain() -> None:
    assert update_gain(0.4, 0.5, 0.6) == pytest.approx(0.5)
    assert update_gain(40, 30, 60) == pytest.approx(-0.5)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(InputError, match=r"the matrix has shape \(2, 3\)"):
        compatibility(np.zeros((2, 3)))
    with pytest.raises(InputError, match=r"shape \(1, 1\); .* 2 or more models"):
        compatibility(np.zeros((1, 1)))
    with pytest.raises(InputError, match="entry 1, 0 of the matrix is 64; give fractions"):
        compatibility(np.array([[0.6, 0], [64, 0.7]]))
    with pytest.raises(InputError, match="entry 1, 1 of the matrix is nan"):
        compatibility(np.array([[0.6, 0], [0.64, np.nan]]))
    with pytest.raises(InputError, match=r"old_hits have shape \(3,\), new_hits \(2,\)"):
        flip_rates(np.zeros(3), np.zeros(2))
    with pytest.raises(InputError, match="new_hits of query 1 is 2"):
        flip_rates(np.zeros(2), np.array([0, 2]))
    with pytest.raises(InputError, match=r"new_new is 0.5 and old_old 0.5"):
        update_gain(0.5, 0.5, 0.5)
    with pytest.raises(InputError, match="new_old is nan"):
        update_gain(0.5, float("nan"), 0.6)
