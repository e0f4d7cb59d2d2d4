"""Similarity of representations against loops over sets and explicit kernels, and its invariances."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors

from mmalign import representation_similarity
from mmalign.errors import InputError
from mmalign.representation_similarity import (
    cknna,
    cycle_knn,
    linear_cka,
    mutual_knn,
    nearest_neighbours,
    unbiased_linear_cka,
)


def related(n: int = 40, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    shared = torch.randn(n, 3, generator=rng, dtype=dtype)
    x, y = (
        shared @ torch.randn(3, d, generator=rng, dtype=dtype)
        + 0.7 * torch.randn(n, d, generator=rng, dtype=dtype)
        + 0.3
        for d in (7, 5)
    )
    return x, y


def rotation(d: int, seed: int = 1) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]


def kernels(x: torch.Tensor, y: torch.Tensor) -> list[np.ndarray]:
    return [(rows @ rows.T).numpy() for rows in (x, y)]


def hsic_by_loops(k: np.ndarray, l: np.ndarray) -> float:  # noqa: E741
    """Song et al. 2012, eq. 4: averages over distinct pairs, triples and quadruples."""
    n, items = len(k), range(len(k))
    pairs = sum(k[i, j] * l[i, j] for i in items for j in items if i != j)
    triples = sum(k[i, j] * l[i, q] for i in items for j in items for q in items if len({i, j, q}) == 3)
    quadruples = sum(
        k[i, j] * l[q, r] for i in items for j in items for q in items for r in items if len({i, j, q, r}) == 4
    )
    two, three, four = n * (n - 1), n * (n - 1) * (n - 2), n * (n - 1) * (n - 2) * (n - 3)
    return pairs / two - 2 * triples / three + quadruples / four


@pytest.mark.parametrize("block", [1, 100, 1 << 20])
def test_neighbours_are_those_of_scikit_learn(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(representation_similarity, "BLOCK_ELEMENTS", block)
    x, _ = related()
    wanted = NearestNeighbors(n_neighbors=6, metric="cosine").fit(x.numpy()).kneighbors(return_distance=False)
    np.testing.assert_array_equal(nearest_neighbours(x, 6).numpy(), wanted)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 20), st.data())
def test_mutual_knn_is_set_intersection(seed: int, n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, n - 1))
    a, b = (nearest_neighbours(rows, k) for rows in related(n, seed))
    by_hand = sum(len(set(p) & set(q)) for p, q in zip(a.tolist(), b.tolist(), strict=True)) / (n * k)
    assert mutual_knn(a, b) == pytest.approx(by_hand)
    assert mutual_knn(a, a) == 1


def test_linear_cka_is_hsic_of_centred_kernels() -> None:
    x, y = related()
    centring = np.eye(len(x)) - 1 / len(x)
    k, l = (centring @ kernel @ centring for kernel in kernels(x, y))  # noqa: E741
    assert linear_cka(x, y) == pytest.approx((k * l).sum() / np.sqrt((k * k).sum() * (l * l).sum()))


def test_unbiased_cka_is_hsic_over_distinct_items() -> None:
    x, y = related(9)
    k, l = kernels(x, y)  # noqa: E741
    wanted = hsic_by_loops(k, l) / np.sqrt(hsic_by_loops(k, k) * hsic_by_loops(l, l))
    assert unbiased_linear_cka(x, y) == pytest.approx(wanted)


def test_unrelated_rows_have_no_unbiased_alignment() -> None:
    rng = torch.Generator().manual_seed(3)
    pairs = [[torch.randn(40, 60, generator=rng) for _ in "xy"] for _ in range(20)]
    assert abs(np.mean([unbiased_linear_cka(*pair) for pair in pairs])) < 0.02
    assert np.mean([linear_cka(*pair) for pair in pairs]) > 0.4


@pytest.mark.parametrize("metric", [linear_cka, unbiased_linear_cka])
def test_cka_ignores_rotation_scale_and_shift(metric: object) -> None:
    x, y = related()
    moved = 3 * y @ rotation(5) + 10
    assert metric(x, moved) == pytest.approx(metric(x, y))  # type: ignore[operator]
    assert metric(x, x @ rotation(7)) == pytest.approx(1)  # type: ignore[operator]
    assert metric(x, y) == pytest.approx(metric(y, x))  # type: ignore[operator]
    assert metric(x.float(), y.float()) == pytest.approx(metric(x, y), rel=1e-5)  # type: ignore[operator]


def test_cknna_keeps_the_kernels_of_shared_neighbours() -> None:
    """The masked kernels by hand, through HSIC written with matrices."""
    x, y = (torch.nn.functional.normalize(rows, dim=1) for rows in related(15))
    n, k = len(x), 4
    gram = kernels(x, y)
    lists = [nearest_neighbours(rows, k).tolist() for rows in (x, y)]

    def hsic(a: int, b: int) -> float:
        left, right = np.zeros((n, n)), np.zeros((n, n))
        for i in range(n):
            for j in set(lists[a][i]) & set(lists[b][i]):
                left[i, j], right[i, j] = gram[a][i, j], gram[b][i, j]
        one = np.ones(n)
        return (
            np.trace(left @ right)
            + (one @ left @ one) * (one @ right @ one) / ((n - 1) * (n - 2))
            - 2 * (one @ left @ right @ one) / (n - 2)
        )

    assert cknna(x, y, k) == pytest.approx(hsic(0, 1) / np.sqrt(hsic(0, 0) * hsic(1, 1)))
    assert cknna(x, y, n - 1) == pytest.approx(unbiased_linear_cka(x, y))
    assert cknna(x, x @ rotation(7), k) == pytest.approx(1)


def test_cycle_knn_walks_there_and_back() -> None:
    x, y = related()
    to_x, to_y = (nearest_neighbours(rows, 3).tolist() for rows in (x, y))
    back = [any(i in to_x[j] for j in to_y[i]) for i in range(len(x))]
    assert 0 < sum(back) < len(x)
    assert cycle_knn(x, y, 3) == pytest.approx(sum(back) / len(x))


def test_what_cannot_be_compared_is_refused() -> None:
    x, y = related()
    with pytest.raises(InputError, match=r"k is 40, and each of 40 rows has 39"):
        nearest_neighbours(x, 40)
    with pytest.raises(InputError, match="k is 0"):
        nearest_neighbours(x, 0)
    with pytest.raises(InputError, match="x has 40 rows, y 39"):
        linear_cka(x, y[1:])
    with pytest.raises(InputError, match="3 rows; give 4 or more"):
        unbiased_linear_cka(x[:3], y[:3])
    with pytest.raises(InputError, match="y does not vary"):
        linear_cka(x, torch.ones_like(y))
    with pytest.raises(InputError, match="float16"):
        linear_cka(x.half(), y)
    with pytest.raises(InputError, match="give a matrix"):
        linear_cka(x[0], y)
    with pytest.raises(InputError, match=r"shapes \(40, 2\) and \(40, 3\)"):
        mutual_knn(nearest_neighbours(x, 2), nearest_neighbours(y, 3))
    y[4, 1] = torch.nan
    with pytest.raises(InputError, match="y row 4 holds NaN"):
        cycle_knn(x, y, 3)
