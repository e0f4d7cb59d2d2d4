"""Backfill orders, mixed galleries and curves against plain loops."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

import mmalign.partial_backfill as module
from mmalign.errors import InputError
from mmalign.partial_backfill import (
    backfill_order,
    backfilling_curve,
    class_mean_distances,
    class_means,
    curve_area,
    local_density,
    mixed_gallery,
)

DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])
RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(40, 6)) + 0.5
LABELS = RNG.permutation(np.arange(40) % 7)


@pytest.fixture(params=[1 << 24, 50])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All at once, and a few rows at a time."""
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", request.param)


@DTYPES
def test_class_means_are_a_loop(dtype: type) -> None:
    names = np.array(["cat", "dog", "eel", "fox", "gnu", "hen", "ibis"])[LABELS]
    classes, means = class_means(ROWS.astype(dtype), names)
    assert classes.tolist() == sorted(set(names))
    assert means.dtype == np.float64
    for name, mean in zip(classes, means, strict=True):
        own = [row for row, label in zip(ROWS, names, strict=True) if label == name]
        np.testing.assert_allclose(mean, sum(own) / len(own), rtol=1e-6 if dtype == np.float32 else 1e-12)


@DTYPES
@pytest.mark.usefixtures("blocks")
def test_distances_are_a_loop(dtype: type) -> None:
    l2, cosine = (class_mean_distances(ROWS.astype(dtype), LABELS, distance=name) for name in ("l2", "cosine"))
    atol = 1e-6 if dtype == np.float32 else 1e-12
    for i, row in enumerate(ROWS):
        mean = np.mean([ROWS[j] for j in range(40) if LABELS[j] == LABELS[i]], axis=0)
        assert l2[i] == pytest.approx(sum((row - mean) ** 2) ** 0.5, abs=atol)
        assert cosine[i] == pytest.approx(1 - row @ mean / np.linalg.norm(row) / np.linalg.norm(mean), abs=atol)


@DTYPES
@pytest.mark.parametrize("neighbours", [1, 5, 39])
@pytest.mark.usefixtures("blocks")
def test_density_is_a_loop(neighbours: int, dtype: type) -> None:
    found = local_density(ROWS.astype(dtype), neighbours=neighbours)
    for i, row in enumerate(ROWS):
        others = [row @ o / np.linalg.norm(row) / np.linalg.norm(o) for j, o in enumerate(ROWS) if j != i]
        assert found[i] == pytest.approx(np.mean(sorted(others)[-neighbours:]), abs=1e-6)


def test_orders_sort_by_their_key() -> None:
    counts = RNG.integers(0, 5, 40)
    density = RNG.normal(size=40).round(1)
    keys = {
        "class_mean": (class_mean_distances(ROWS, LABELS), {"labels": LABELS}),
        "density": (-local_density(ROWS, neighbours=4), {"neighbours": 4}),
        "access": (counts, {"counts": counts}),
    }
    for how, (key, options) in keys.items():
        order = backfill_order(how, ROWS, **options)
        assert order.dtype == np.int64
        assert order.tolist() == sorted(range(40), key=lambda i, key=key: (-key[i], i)), how
    by_cosine = backfill_order("class_mean", ROWS, labels=LABELS, distance="cosine")
    cosine = class_mean_distances(ROWS, LABELS, distance="cosine")
    assert by_cosine.tolist() == sorted(range(40), key=lambda i: (-cosine[i], i))
    given = backfill_order("density", ROWS, density=density)
    assert given.tolist() == sorted(range(40), key=lambda i: (density[i], i))
    own = backfill_order(lambda rows: rows[:, 0].round(), ROWS)
    assert own.tolist() == sorted(range(40), key=lambda i: (-ROWS[i, 0].round(), i))


def test_lonely_and_far_rows_come_first() -> None:
    rows = np.concatenate([np.eye(3)[0] + 0.01 * RNG.normal(size=(20, 3)), [[0, 0, 1.0]]])
    assert backfill_order("density", rows, neighbours=3)[0] == 20
    assert backfill_order("class_mean", rows, labels=np.zeros(21))[0] == 20


def test_random_order_depends_on_the_seed_alone() -> None:
    first, again, other = (backfill_order("random", ROWS, seed=seed) for seed in (1, 1, 2))
    assert sorted(first) == list(range(40))
    assert first.tolist() == again.tolist() != other.tolist()


def test_mixed_gallery_and_curve() -> None:
    new = ROWS + 100
    order = backfill_order("random", ROWS)
    for share, expected in ((0, 0), (0.26, 10), (0.5, 20), (0.999, 39), (1, 40)):
        mixed = mixed_gallery(ROWS, new, order, share)
        assert (mixed[:, 0] > 50).nonzero()[0].tolist() == sorted(order[:expected])
        np.testing.assert_array_equal(mixed, np.where(mixed > 50, new, ROWS))
    curve = backfilling_curve(ROWS, new, order, lambda gallery: (gallery[:, 0] > 50).mean(), [0, 0.5, 1])
    assert curve.tolist() == [0, 0.5, 1]
    assert (ROWS < 50).all()  # measuring does not write into what was given


@pytest.mark.parametrize("n", [7, 10, 100, 120])
def test_shares_are_not_lost_to_the_rounding_of_floats(n: int) -> None:
    old, new = np.zeros((n, 1)), np.ones((n, 1))
    for percent in range(101):
        exact = (Fraction(percent, 100) * n).__floor__()
        for share in (percent / 100, 1 - (100 - percent) / 100, percent * 0.01):
            assert mixed_gallery(old, new, np.arange(n), min(share, 1.0)).sum() == exact


def test_area_is_mean_and_trapezoids() -> None:
    mean, area = curve_area([0, 0.25, 1], [1.0, 2.0, 4.0])
    assert mean == pytest.approx(7 / 3)
    assert area == pytest.approx(0.25 * 1.5 + 0.75 * 3)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(InputError, match='order "class_mean" needs labels'):
        backfill_order("class_mean", ROWS)
    with pytest.raises(InputError, match='order "access" needs counts'):
        backfill_order("access", ROWS)
    with pytest.raises(InputError, match=r"labels have shape \(39,\); give one class for each of 40 rows"):
        backfill_order("class_mean", ROWS, labels=LABELS[1:])
    with pytest.raises(InputError, match=r"counts have shape \(39,\)"):
        backfill_order("access", ROWS, counts=LABELS[1:])
    with pytest.raises(InputError, match="density: row 2 has nan"):
        backfill_order("density", ROWS, density=np.where(np.arange(40) == 2, np.nan, 0))
    with pytest.raises(InputError, match="the keys of the function have shape"):
        backfill_order(lambda rows: rows, ROWS)
    with pytest.raises(InputError, match="how is 'oldest'; give one of random"):
        backfill_order("oldest", ROWS)
    with pytest.raises(InputError, match="distance is 'l1'"):
        class_mean_distances(ROWS, LABELS, distance="l1")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="neighbours is 40, and each of 40 rows has 39"):
        local_density(ROWS, neighbours=40)
    with pytest.raises(InputError, match=r"old has shape \(40, 6\), new \(40, 5\)"):
        mixed_gallery(ROWS, ROWS[:, 1:], np.arange(40), 0.5)
    with pytest.raises(InputError, match="must name each of 40 rows once"):
        mixed_gallery(ROWS, ROWS, np.zeros(40, int), 0.5)
    with pytest.raises(InputError, match=r"share is 1\.5"):
        mixed_gallery(ROWS, ROWS, np.arange(40), 1.5)
    with pytest.raises(InputError, match="shares must ascend"):
        curve_area([0, 1, 0.5], [1, 2, 3])
    with pytest.raises(InputError, match=r"shares have shape \(3,\), values \(2,\)"):
        curve_area([0, 0.5, 1], [1, 2])
