"""Layer scores, closed forms and mini-vec2vec's stages against their golden files."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmalign.closed_forms import csa_coordinates, csa_scores, fit_cca, procrustes
from mmalign.layer_selection import layer_scores, neighbour_count
from mmalign.mini_vec2vec import (
    anchor_kernel,
    frame,
    match_clusters,
    paired_metrics,
    pseudo_targets,
    refine_by_clusters,
    refine_by_neighbours,
    relative_similarity,
)
from mmalign.representation_similarity import (
    cknna,
    cycle_knn,
    linear_cka,
    mutual_knn,
    nearest_neighbours,
    unbiased_linear_cka,
)

FLOAT32 = 1e-5  # where the json states no tolerance for float32 inputs
DTYPES = pytest.mark.parametrize("dtype", ["float64", "float32"])


def tensor(golden: Any, name: str, dtype: str) -> Tensor:
    return torch.from_numpy(golden[name].astype(dtype))


# -- align_mutual_knn ------------------------------------------------------------------------------


def rank_tie_tolerance(golden: Any, k: int, dtype: str) -> float:
    """The json's "1/(N*k)": one neighbour swapped in one row."""
    stated = str(golden.meta["suggested_tolerance"])
    if re.search(r"1\s*/\s*\(N\s*\*\s*k\)", stated):
        return 1 / (len(golden["x_layers"]) * k) + 1e-6  # scores are stored as rounded float32
    return max(golden.tolerance(dtype, FLOAT32).values())


@pytest.mark.golden("align_mutual_knn")
@DTYPES
def test_layer_scores(golden: Any, dtype: str) -> None:
    x, y = golden["x_layers"].astype(dtype), golden["y_layers"].astype(dtype)
    n = len(x)
    for rule, count in golden.meta["k_rules"].items():
        assert neighbour_count(n, rule) == count
    cases = [name.removeprefix("mutual_knn_k_") for name in golden.names if name.startswith("mutual_knn_k_")]
    assert cases
    for case in cases:
        k = int(case) if case.isdigit() else case
        # Row and column 0 of the file are all layers side by side.
        both = [[side.reshape(n, -1), *side.transpose(1, 0, 2)] for side in (x, y)]
        scores = layer_scores(*both, k=k)
        tolerance = rank_tie_tolerance(golden, scores.k, dtype)
        np.testing.assert_allclose(scores.table, golden[f"mutual_knn_k_{case}"], rtol=0, atol=tolerance)
        assert scores.chance == pytest.approx(scores.k / (n - 1))

        winner = golden.meta["best"][case]
        without = layer_scores(both[0][1:], both[1][1:], k=k)
        assert without.k == winner["k"]
        np.testing.assert_array_equal(without.table, scores.table[1:, 1:])
        assert without.table[without.best] == pytest.approx(winner["score"], abs=tolerance)
        runner_up = np.sort(without.table.ravel())[-2]
        if without.table.max() - runner_up > 2 * tolerance:
            assert list(without.best) == list(winner["best_layer_pair_excluding_concat"])
    golden.ignore(*golden.names)  # the metrics of one pair are read below


@pytest.mark.golden("align_mutual_knn")
@DTYPES
def test_metrics_of_one_pair(golden: Any, dtype: str) -> None:
    i, j = golden.meta["pair_for_single_metrics"]
    k = golden.meta["single_metric_k"]
    x, y = (normalize(tensor(golden, f"{s}_layers", dtype)[:, at], dim=1) for s, at in (("x", i), ("y", j)))
    lists = nearest_neighbours(x, k), nearest_neighbours(y, k)
    tolerance = rank_tie_tolerance(golden, k, dtype)
    for name, ours, rows in (("neighbours_x", lists[0], x), ("neighbours_y", lists[1], y)):
        for row in decided(rows @ rows.T - 2 * torch.eye(len(rows), dtype=rows.dtype), k, dtype):
            assert set(ours[row].tolist()) == set(golden[name][row].tolist()), f"{name} row {row}"
    table = f"mutual_knn_k_{k}"
    if table in golden:
        assert mutual_knn(*lists) == pytest.approx(golden[table][i + 1, j + 1], abs=tolerance)
    ours = {
        "cka_pair": linear_cka(x, y),
        "unbiased_cka_pair": unbiased_linear_cka(x, y),
        "cknna_pair": cknna(x, y, k),
        "cycle_knn_pair": cycle_knn(x, y, k),
    }
    for name, value in ours.items():
        assert value == pytest.approx(float(golden[name]), abs=tolerance), name
    # Stored in float32 and with 1e-6 added to the denominators, HSIC of unit rows: far below one swapped neighbour.
    assert ours["cka_pair"] == pytest.approx(float(golden["cka_pair"]), abs=1e-5)
    golden.ignore(*(name for name in golden.names if name.startswith("mutual_knn_k_")))  # read above


def decided(similarity: Tensor, k: int, dtype: str) -> list[int]:
    """Rows whose k nearest are told from the next by more than the rounding of the dtype; most of them."""
    if k >= similarity.shape[1]:
        return list(range(len(similarity)))
    top = similarity.topk(k + 1, dim=1).values
    rows = (top[:, k - 1] - top[:, k] > (1e-12 if dtype == "float64" else 1e-5)).nonzero().flatten().tolist()
    assert len(rows) > len(similarity) / 2
    return rows


# -- align_csa -------------------------------------------------------------------------------------


@pytest.mark.golden("align_csa")
@DTYPES
def test_csa(golden: Any, dtype: str) -> None:
    def close(name: str, actual: Tensor) -> None:
        golden.assert_close(name, actual, dtype, FLOAT32)

    x, y, query_x, query_y = (tensor(golden, name, dtype) for name in ("x", "y", "query_x", "query_y"))
    r, dims, shrinkage = (golden.hyper[name] for name in ("r", "score_dims_s", "shrinkage_rho"))
    plain = fit_cca(x, y)
    close("mean_x", plain.mean_x)
    close("mean_y", plain.mean_y)
    close("correlations", plain.correlations)
    for name, rows, mean, projection in (
        ("projection_x_abs", x, plain.mean_x, plain.projection_x),
        ("projection_y_abs", y, plain.mean_y, plain.projection_y),
    ):
        close(name, ((rows[: len(golden[name])] - mean) @ projection[:, :r]).abs())
    close("score", csa_scores(plain, query_x, query_y, dims))
    close("score_unweighted", csa_scores(plain, query_x, query_y, dims, weighted=False))
    left = csa_coordinates(query_x, plain.mean_x, plain.projection_x, plain.correlations, dims)
    right = csa_coordinates(query_y, plain.mean_y, plain.projection_y, plain.correlations, dims)
    close("score", left @ right.T)

    shrunk = fit_cca(x, y, shrinkage=shrinkage)
    close("correlations_shrunk", shrunk.correlations)
    close("score_shrunk", csa_scores(shrunk, query_x, query_y, dims))


# -- align_mini_vec2vec ----------------------------------------------------------------------------


@pytest.mark.golden("align_mini_vec2vec")
@DTYPES
def test_mini_vec2vec_stages(golden: Any, dtype: str) -> None:
    """Every step from the stored inputs of that step."""

    def close(name: str, actual: Tensor, where: Any = ...) -> None:
        golden.assert_close(name, actual, dtype, where=where)

    def stored(name: str) -> Tensor:
        return tensor(golden, name, dtype)

    hyper = golden.hyper
    (x, mean_a), (y, mean_b) = frame(stored("raw_a")), frame(stored("raw_b"))
    close("mean_a", mean_a)
    close("mean_b", mean_b)

    anchors_a, anchors_b = stored("anchors_a"), stored("anchors_b")
    assert len(anchors_a) == hyper["runs_s"] * hyper["clusters_c"]
    first = golden["relative_similarity_rows"].shape[0]
    similarity = relative_similarity(x, y, anchors_a, anchors_b)
    close("relative_similarity_rows", similarity[:first])
    k = hyper["neighbours_k"]
    pairs = pseudo_targets(x, y, anchors_a, anchors_b, k, block=len(x) // 3 + 1)
    rows = decided(similarity, k, dtype)
    np.testing.assert_array_equal(np.sort(pairs.neighbours[rows].numpy()), np.sort(golden["topk"][rows]))
    close("pseudo_targets", pairs.targets[rows], where=rows)
    close("W0", procrustes(x, stored("pseudo_targets")))

    alpha, index = hyper["alpha"], golden["refine1_sample_index"]
    assert len(index) == hyper["refine1_sample"]
    sample, k = x[torch.from_numpy(index.astype(np.int64))], hyper["refine1_neighbours_k2"]
    step = refine_by_neighbours(sample, y, stored("W0"), k, alpha)
    rows = decided(normalize(sample @ stored("W0"), dim=1) @ y.T, k, dtype)
    close("refine1_matched", step.targets[rows], where=rows)
    close("refine1_W_new", procrustes(sample, stored("refine1_matched")))
    if len(rows) == len(sample):
        close("refine1_W_new", step.step)
        close("W1", step.matrix)

    assert len(golden["refine2_centers_a"]) == hyper["refine2_clusters"]
    step = refine_by_clusters(stored("refine2_centers_a"), stored("refine2_centers_b"), stored("W1"), alpha)
    close("refine2_W_new", step.step)
    close("W2", step.matrix)
    golden.ignore(*(name for name in golden.names if name.startswith(("run0_", "qap_", "eval_", "singular_"))))


@pytest.mark.golden("align_mini_vec2vec")
def test_mini_vec2vec_matching(golden: Any) -> None:
    clusters, runs = golden.hyper["clusters_c"], golden.hyper["runs_s"]
    kernels = [anchor_kernel(tensor(golden, f"run0_centers_{side}", "float64")) for side in "ab"]
    golden.assert_close("run0_kernel_a", kernels[0], default=1e-9)
    golden.assert_close("run0_kernel_b", kernels[1], default=1e-9)
    order, objective = match_clusters(*kernels, restarts=200, seed=1)
    assert objective == pytest.approx(float(golden["run0_objective"]), rel=1e-9)
    np.testing.assert_array_equal(order.numpy(), golden["run0_perm"])
    np.testing.assert_array_equal(golden["anchors_a"][:clusters], golden["run0_centers_a"])
    np.testing.assert_array_equal(golden["anchors_b"][:clusters], golden["run0_centers_b"][order.numpy()])

    # The stored anchors are matched already: the identity reaches the optimum, and we find it.
    for run in range(runs):
        here = slice(run * clusters, (run + 1) * clusters)
        left, right = (anchor_kernel(tensor(golden, f"anchors_{side}", "float64")[here]) for side in "ab")
        optimum, best_of_restarts = golden["qap_objective_per_run"][run]
        assert float((left * right).sum()) == pytest.approx(optimum, rel=1e-9)
        found = match_clusters(left, right, restarts=200, seed=run)[1]
        assert best_of_restarts - 1e-9 <= found <= optimum + 1e-9
    golden.ignore(*golden.names)


@pytest.mark.golden("align_mini_vec2vec")
@DTYPES
def test_mini_vec2vec_evaluation(golden: Any, dtype: str) -> None:
    left, right = (normalize(tensor(golden, f"eval_{s}", dtype) - tensor(golden, f"mean_{s}", dtype)) for s in "ab")
    maps = [name.removeprefix("eval_") for name in golden.names if name.startswith("eval_W")]
    assert maps
    for name in maps:
        matrix = tensor(golden, name, dtype)
        metrics = paired_metrics(left @ matrix, right, block=len(left) // 3 + 1)
        exact = normalize(torch.from_numpy(golden["eval_a"] - golden["mean_a"])) @ torch.from_numpy(golden[name])
        close_calls = normalize(exact) @ normalize(torch.from_numpy(golden["eval_b"] - golden["mean_b"])).T
        gaps = (close_calls - close_calls.diagonal().unsqueeze(1)).abs() + torch.eye(len(left))
        compared = 1 if dtype == "float32" and gaps.min() < 1e-5 else len(metrics)
        golden.assert_close(f"eval_{name}", metrics[:compared], dtype, where=slice(compared))
        golden.assert_close(f"singular_values_{name}", torch.linalg.svdvals(matrix), dtype)
    golden.ignore(*golden.names)
