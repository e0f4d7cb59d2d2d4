"""OPIS against a loop over pairs, and what its blocks and samples must not change."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

from mmalign.errors import InputError
from mmalign.metrics import OPISResult, opis

module = importlib.import_module("mmalign.metrics.opis")


def problem(n: int = 40, classes: int = 4, spread: tuple[float, ...] = (0.2, 0.9), seed: int = 0) -> tuple[Any, Any]:
    """Classes around random centres, of different width; their names are words."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=n)
    width = np.linspace(*spread, classes)[labels, None]
    rows = rng.normal(size=(classes, 8))[labels] + width * rng.normal(size=(n, 8))
    return rows * rng.uniform(0.5, 2, size=(n, 1)), np.array([f"class {i}" for i in labels])


def by_hand(pairs: Iterable[tuple[Any, Any, Any, Any]], far: tuple[float, float], points: int, c: float) -> dict:
    """Everything from a list of pairs (row, label, row, label)."""
    seen = [(math.dist(a / np.linalg.norm(a), b / np.linalg.norm(b)), s, t) for a, s, b, t in pairs]
    negatives = [d for d, s, t in seen if s != t]
    low, high = np.quantile(negatives, far)
    names = sorted({s for _, s, t in seen if s == t})
    grid, utility = np.linspace(low, high, points), []
    for name in names:
        positive = [d for d, s, t in seen if s == t == name]
        negative = [d for d, s, t in seen if (s == name) != (t == name)]
        row = []
        for d in grid:
            se = sum(x <= d for x in positive) / len(positive)
            sp = sum(x > d for x in negative) / len(negative)
            row.append((1 + c * c) * se * sp / (c * c * sp + se) if se + sp else 0.0)
        utility.append(row)
    square = (np.array(utility) - np.mean(utility, axis=0)) ** 2
    integral = sum((square[:, k] + square[:, k + 1]) / 2 * (grid[k + 1] - grid[k]) for k in range(points - 1))
    return {
        "opis": float(np.mean(integral) / (high - low)),
        "grid": grid,
        "utility": np.array(utility),
        "labels": names,
        "thresholds": {rate: np.quantile(negatives, rate) for rate in (1e-3, 1e-2)},
    }


def assert_is(result: OPISResult, expected: dict) -> None:
    assert result.labels.tolist() == expected["labels"]
    np.testing.assert_allclose(result.grid, expected["grid"], rtol=1e-10)
    np.testing.assert_allclose(result.utility, expected["utility"], rtol=1e-10)
    assert result.opis == pytest.approx(expected["opis"], rel=1e-10)
    assert result.thresholds == pytest.approx(expected["thresholds"])


@pytest.mark.parametrize("block", [1, 100, 2**21])
def test_within_one_set(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", block)
    rows, labels = problem()
    rows, labels = np.concatenate([rows, np.ones((1, 8))]), np.append(labels, "alone")
    items = list(zip(rows, labels, strict=True))
    pairs = [(*a, *b) for a, b in itertools.combinations(items, 2)]
    result = opis(rows, labels, far=(0.02, 0.2), grid_points=13, c=1.7)
    assert_is(result, by_hand(pairs, (0.02, 0.2), 13, 1.7))
    assert result.n_left_out == 1
    assert "alone" not in result.labels


@pytest.mark.parametrize("block", [1, 100, 2**21])
def test_rows_against_a_gallery(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", block)
    rows, labels = problem(15)
    gallery, names = problem(23, seed=1)
    names[0], labels[0] = "only here", "only there"
    pairs = [(*a, *b) for a in zip(rows, labels, strict=True) for b in zip(gallery, names, strict=True)]
    result = opis(rows, labels, gallery=gallery, gallery_labels=names, grid_points=9)
    assert_is(result, by_hand(pairs, (0.01, 0.1), 9, 1.0))
    assert result.n_left_out == 2


def test_a_label_on_one_side_has_negative_pairs_there() -> None:
    rows, gallery = np.eye(3)[[0, 0, 1]], np.eye(3)[[0, 1, 2]]
    result = opis(rows, [0, 0, 1], gallery=gallery, gallery_labels=[0, 1, 2])
    assert result.labels.tolist() == [0, 1]
    assert result.n_left_out == 1
    assert result.d_min == result.d_max == pytest.approx(math.sqrt(2))
    assert result.opis == 0  # both classes have sensitivity 1 and specificity 0 at the only distance
    assert np.isfinite(result.utility).all()


def test_samples_come_near_to_all_pairs() -> None:
    rows, labels = problem(1200, classes=6)
    gallery, names = problem(1500, classes=6, seed=0)
    for more in ({}, {"gallery": gallery, "gallery_labels": names}):
        exact = opis(rows, labels, max_pairs=None, **more)
        sampled = opis(rows, labels, max_pairs=400_000, seed=1, **more)
        assert sampled.opis == pytest.approx(exact.opis, rel=0.15)
        assert sampled.d_max == pytest.approx(exact.d_max, rel=0.03)
        np.testing.assert_allclose(sampled.specificity, exact.specificity, atol=0.03)
        np.testing.assert_allclose(sampled.sensitivity, exact.sensitivity, atol=0.1)
        assert opis(rows, labels, max_pairs=400_000, seed=1, **more).opis == sampled.opis
        assert opis(rows, labels, max_pairs=400_000, seed=2, **more).opis != sampled.opis


def test_classes_of_one_width_are_more_consistent() -> None:
    alike, unlike = opis(*problem(600, spread=(0.5, 0.5))), opis(*problem(600, spread=(0.1, 0.9)))
    assert alike.opis < unlike.opis / 2
    np.testing.assert_allclose(unlike.class_contribution.mean(), unlike.grid_mean)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"far": (0.1, 0.01)}, "two rising rates"),
        ({"far": (0.0, 0.1)}, "two rising rates"),
        ({"grid_points": 1}, "grid_points is 1"),
        ({"c": 0.0}, "c is 0"),
        ({"max_pairs": 0}, "max_pairs is 0"),
        ({"max_pairs": 1}, "max_pairs leaves a class without a negative pair"),
        ({"gallery": np.ones((2, 8))}, "both or neither"),
        ({"gallery": np.ones((2, 8)), "gallery_labels": ["class 0"]}, "gallery_labels have shape"),
        ({"gallery": np.ones((2, 5)), "gallery_labels": ["a", "b"]}, "8 dimensions, gallery 5"),
    ],
    ids=str,
)
def test_refusals(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        opis(*problem(), **options)


def test_refusals_of_labels() -> None:
    rows, labels = problem()
    with pytest.raises(InputError, match="labels have shape"):
        opis(rows, labels[:5])
    with pytest.raises(InputError, match="no label has two items"):
        opis(rows, np.arange(len(rows)))
    with pytest.raises(InputError, match="no negative pair"):
        opis(rows, np.zeros(len(rows)))
