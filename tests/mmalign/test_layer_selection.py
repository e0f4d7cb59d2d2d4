"""Layer scores against set loops and rows that are really shuffled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mmalign import layer_selection
from mmalign.errors import InputError
from mmalign.layer_selection import layer_scores, neighbour_count
from mmalign.representation_similarity import nearest_neighbours, unbiased_linear_cka

N = 60


def layers(seed: int = 0, x_count: int = 10, y_count: int = 3) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Layers that share more of one signal the later they are; widths differ."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(N, 4))

    def layer(share: float, width: int) -> np.ndarray:
        return share * shared @ rng.normal(size=(4, width)) + rng.normal(size=(N, width))

    return [layer(i / x_count, 6 + i) for i in range(x_count)], [layer(j / 2 + 0.2, 5 + j) for j in range(y_count)]


def by_sets(x: np.ndarray, y: np.ndarray, k: int) -> float:
    lists = [nearest_neighbours(torch.from_numpy(rows), k).tolist() for rows in (x, y)]
    return sum(len(set(a) & set(b)) for a, b in zip(*lists, strict=True)) / (N * k)


def test_the_table_is_mutual_knn_of_every_pair() -> None:
    x, y = layers()
    result = layer_scores(x, y, k=5)
    wanted = np.array([[by_sets(a, b, 5) for b in y] for a in x])
    np.testing.assert_allclose(result.table, wanted)
    assert wanted[result.best] == wanted.max()
    assert (result.k, result.n, result.chance) == (5, N, 5 / 59)
    assert result.calibrated is None
    np.testing.assert_array_equal(layer_scores(y, x, k=5).table, result.table.T)


def test_neighbours_of_a_layer_are_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(
        layer_selection, "nearest_neighbours", lambda rows, k: calls.append(1) or nearest_neighbours(rows, k)
    )
    x, y = layers()
    layer_scores(x, y, permutations=20)
    assert len(calls) == len(x) + len(y)


def test_memory_maps_and_tensors_and_halves(tmp_path: Path) -> None:
    x, y = layers(x_count=2)
    mapped = []
    for index, layer in enumerate(x):
        np.save(tmp_path / f"{index}.npy", layer.astype(np.float16))
        mapped.append(np.load(tmp_path / f"{index}.npy", mmap_mode="r"))
    halves = [torch.from_numpy(layer).half() for layer in x]
    exact = layer_scores([layer.float() for layer in halves], y, k=5).table
    np.testing.assert_array_equal(layer_scores(mapped, y, k=5).table, exact)
    np.testing.assert_array_equal(layer_scores(halves, [torch.from_numpy(layer) for layer in y], k=5).table, exact)


def test_calibration_is_that_of_rows_really_shuffled() -> None:
    x, y = layers()
    result = layer_scores(x, y, k=5, permutations=40, seed=3)
    rng = np.random.default_rng(3)
    maxima = []
    for _ in range(40):
        order = rng.permutation(N)
        maxima.append(max(by_sets(a, b[order], 5) for a in x for b in y))
    threshold = sorted(maxima)[38]  # at most 5 % of 40 lie above
    assert result.threshold == pytest.approx(threshold)
    np.testing.assert_allclose(result.calibrated, np.maximum(0, (result.table - threshold) / (1 - threshold)))
    assert result.calibrated is not None
    assert result.calibrated[result.best] > 0
    np.testing.assert_array_equal(result.table, layer_scores(x, y, k=5).table)


def test_unrelated_layers_score_chance_and_calibrate_to_nothing() -> None:
    x, y = layers()
    shuffled = [layer[np.random.default_rng(1).permutation(N)] for layer in y[:1]]
    result = layer_scores(x, shuffled, permutations=100)
    assert result.table.mean() == pytest.approx(result.chance, abs=0.05)
    assert result.calibrated is not None
    assert result.calibrated.max() < 0.05
    assert layer_scores(x, x, permutations=20).calibrated.diagonal() == pytest.approx(1)  # type: ignore[union-attr]


def test_a_layer_of_equal_rows_scores_nothing() -> None:
    """Ties alone would make two such layers agree wholly."""
    x, y = layers(x_count=2)
    constant = np.ones((N, 4))
    table = layer_scores([*x, constant], [constant, *y], k=5).table
    np.testing.assert_array_equal(table[:2, 1:], layer_scores(x, y, k=5).table)
    assert not table[2].any()
    assert not table[:, 0].any()
    assert not layer_scores([constant], [constant], k=5, permutations=20).table.any()


@pytest.mark.parametrize(
    ("n", "rule", "wanted"),
    [(5000, "rice", 35), (1000, "rice", 20), (64, "rice", 8), (96, "sqrt", 10), (96, "sturges", 8), (64, "sturges", 7)],
)
def test_rules(n: int, rule: str, wanted: int) -> None:
    assert neighbour_count(n, rule) == wanted


def test_wrong_input_is_named() -> None:
    x, y = layers(x_count=2)
    for k, match in (("scott", "k is 'scott'; give one of rice"), (N, f"k is {N}"), (0, "k is 0"), (2.5, "k is 2.5")):
        with pytest.raises(InputError, match=match):
            layer_scores(x, y, k=k)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"y layer 1 has 59 rows, x layer 0 60"):
        layer_scores(x, [y[0], y[1][1:]])
    with pytest.raises(InputError, match="0 x layers and 3 y layers"):
        layer_scores([], y)
    with pytest.raises(InputError, match="permutations is 5; give 0 for none, or 20 or more"):
        layer_scores(x, y, permutations=5)
    y[2][7, 0] = np.inf
    with pytest.raises(InputError, match="y layer 2 row 7 holds NaN or infinity"):
        layer_scores(x, y)


def test_cka_of_every_pair_is_that_of_the_pair() -> None:
    generator = torch.Generator().manual_seed(4)
    shared = torch.randn(60, 5, generator=generator)
    xs = [shared @ torch.randn(5, width, generator=generator) for width in (7, 11)] + [torch.randn(60, 4)]
    ys = [shared @ torch.randn(5, 6, generator=generator) + 3, torch.ones(60, 3)]
    found = layer_scores(xs, ys, score="cka")
    unit = torch.nn.functional.normalize
    for i, x in enumerate(xs):
        assert found.table[i, 0] == pytest.approx(unbiased_linear_cka(unit(x), unit(ys[0])), abs=1e-6)
    assert found.table[:, 1].tolist() == [0, 0, 0]  # rows that are all the same
    assert found.best[0] in (0, 1)
    assert (found.k, found.chance) == (0, 0)
    with pytest.raises(InputError, match="mutual-knn"):
        layer_scores(xs, ys, score="cka", permutations=50)
