"""Backward-compatible representations against their golden files. Tolerances of the card, section 8."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmalign.lambda_orthogonality import compatibility_objective, lambda_orthogonality
from mmalign.metrics import cmc_map_self_excluded, compatibility
from mmalign.partial_backfill import (
    backfill_order,
    backfilling_curve,
    class_mean_distances,
    class_means,
    curve_area,
    mixed_gallery,
)
from mmalign.spherical_interpolation import interpolate_queries, pad_columns, padded_procrustes, slerp

FLOAT32 = 1e-5  # where the json states no tolerance for float32 inputs
DTYPES = pytest.mark.parametrize("dtype", ["float64", "float32"])


def tensor(golden: Any, name: str, dtype: str) -> Tensor:
    return torch.from_numpy(golden[name].astype(dtype))


# -- bc_procrustes_slerp ---------------------------------------------------------------------------


@pytest.mark.golden("bc_procrustes_slerp")
@DTYPES
def test_procrustes_and_slerp(golden: Any, dtype: str) -> None:
    default = {"float64": 1e-8, "float32": FLOAT32}[dtype]
    new, old = tensor(golden, "support_new", dtype), tensor(golden, "support_old", dtype)
    theirs, d_old = tensor(golden, "R", dtype), old.shape[1]
    rotation = padded_procrustes(new, old)
    assert rotation.shape == theirs.shape
    # The columns beyond d_old are any basis of what the old space does not have: their span is compared.
    golden.assert_close("R", rotation[:, :d_old], dtype, default, where=np.s_[:, :d_old])
    beyond = [matrix[:, d_old:] @ matrix[:, d_old:].T for matrix in (rotation, theirs)]
    np.testing.assert_allclose(*beyond, atol=10 * default)
    golden.assert_close(
        "residual", (new @ rotation - pad_columns(old, rotation.shape[1])).square().sum(), dtype, default
    )

    query_old, query_new = tensor(golden, "q_old", dtype), tensor(golden, "q_new", dtype)
    golden.assert_close("q_new_aligned", query_new @ theirs, dtype, default)
    for i, alpha in enumerate(golden["alphas"].tolist()):
        golden.assert_close(
            "q_slerp", interpolate_queries(query_old, query_new, theirs, alpha), dtype, default, where=i
        )
        # The coordinates that meet the stored vectors do not depend on the basis of the rest.
        ours = interpolate_queries(query_old, query_new, rotation, alpha)[:, :d_old]
        golden.assert_close("q_slerp", ours, dtype, default, where=np.s_[i, :, :d_old])
        with_eps = slerp(pad_columns(query_old, theirs.shape[1]), query_new @ theirs, alpha, eps=golden.hyper["eps"])
        golden.assert_close("q_slerp", with_eps, dtype, default, where=i)


# -- bc_partial_backfill ---------------------------------------------------------------------------

DISTANCE_OF = {"l2": "l2", "cos": "cosine"}


@pytest.mark.golden("bc_partial_backfill")
@DTYPES
def test_partial_backfill(golden: Any, dtype: str) -> None:
    default = {"float64": 1e-12, "float32": FLOAT32}[dtype]
    old, new = (golden[f"gallery_{name}"].astype(dtype) for name in ("forward_old", "backward_new"))
    labels, betas = golden["labels"], golden["betas"]
    classes, means = class_means(old, labels)
    assert classes.tolist() == sorted(set(labels.tolist()))
    golden.assert_close("class_means", means, dtype, default)

    for name in (name.removeprefix("dist_") for name in golden.names if name.startswith("dist_")):
        distances = class_mean_distances(old, labels, distance=DISTANCE_OF[name])
        golden.assert_close(f"dist_{name}", distances, dtype, default)
        order = backfill_order("class_mean", old, labels=labels, distance=DISTANCE_OF[name])
        # Neighbours in the order may change places where their distances differ by less than the rounding.
        expected = golden[f"order_{name}"]
        stated = golden[f"dist_{name}"]
        moved = order != expected
        np.testing.assert_allclose(stated[order[moved]], stated[expected[moved]], rtol=0, atol=10 * default)
        assert dtype == "float32" or not moved.any()

    sizes = [int((mixed_gallery(np.zeros_like(old), np.ones_like(old), golden["order_random"], beta)[:, 0]).sum())
             for beta in betas.tolist()]  # fmt: skip
    np.testing.assert_array_equal(sizes, golden["n_backfilled"])
    orders = [name.removeprefix("order_") for name in golden.names if name.startswith("order_")]
    assert orders
    measures = {
        "cmc1": lambda gallery: cmc_map_self_excluded(new, gallery, labels, topk=1).cmc[0],
        "map": lambda gallery: cmc_map_self_excluded(new, gallery, labels, topk=1).map,
    }
    for name in orders:
        for measure, function in measures.items():
            if f"{measure}_{name}" not in golden:
                continue
            curve = backfilling_curve(old, new, golden[f"order_{name}"], function, betas)
            # Rounding the rows may swap two items of a ranking: one query of all, or a step in one ranking.
            golden.assert_close(f"{measure}_{name}", curve, dtype, 1e-12 if dtype == "float64" else 2 / len(old))
            if f"area_{measure}_{name}" in golden:
                area = curve_area(betas, golden[f"{measure}_{name}"])
                golden.assert_close(f"area_{measure}_{name}", np.array(area), "float64", 1e-12)


# -- bc_compat_matrix ------------------------------------------------------------------------------


@pytest.mark.golden("bc_compat_matrix")
@DTYPES
def test_compatibility_matrix(golden: Any, dtype: str) -> None:
    default = {"float64": 1e-12, "float32": FLOAT32}[dtype]
    cases = [name.removeprefix("matrix") for name in golden.names if name.startswith("matrix")]
    assert cases
    for case in cases:
        # A tie of entries stays one in float32.
        found = compatibility(golden[f"matrix{case}"].astype(dtype))
        np.testing.assert_array_equal(found.incompatible, golden[f"incompatible{case}"])
        golden.assert_close(f"AC{case}", found.average_compatibility, dtype, default)
        golden.assert_close(f"AC_per_task{case}", found.prefix_compatibility, dtype, default)
        golden.assert_close(f"AM{case}", found.average_accuracy, dtype, default)
        golden.assert_close(f"AM_per_task{case}", found.prefix_accuracy, dtype, default)


# -- bc_lambda_orth --------------------------------------------------------------------------------

STEP = 1e9  # so sharp a switch that the loss is the norm itself


@pytest.mark.golden("bc_lambda_orth")
@DTYPES
def test_lambda_orthogonality(golden: Any, dtype: str) -> None:
    default = {"float64": 1e-9, "float32": 1e-4}[dtype]
    settings = golden["lambda_alpha"].tolist()
    names = [name.removeprefix("W_") for name in golden.names if name.startswith("W_")]
    assert [name for name in names if f"loss_{name}" in golden]
    for name in names:
        weight = tensor(golden, f"W_{name}", dtype)
        if f"fro_{name}" in golden:
            golden.assert_close(f"fro_{name}", lambda_orthogonality(weight, 0.0, STEP).reshape(1), dtype, default)
        for gram, matrix in (("WWt", weight), ("WtW", weight.T)):
            if f"{name}_{gram}" in golden:
                both = [lambda_orthogonality(matrix, *setting) for setting in ((0.0, STEP), settings[0])]
                golden.assert_close(f"{name}_{gram}", torch.stack(both), dtype, default)
        if f"loss_{name}" not in golden:
            continue
        for case, (threshold, sharpness) in enumerate(settings):
            leaf = weight.clone().requires_grad_()
            loss = lambda_orthogonality(leaf, threshold, sharpness)
            loss.backward()
            golden.assert_close(f"loss_{name}", loss, dtype, default, where=case)
            golden.assert_close(f"grad_{name}_case{case}", leaf.grad, dtype, default)


# -- bc_lambda_total -------------------------------------------------------------------------------


@pytest.mark.golden("bc_lambda_total")
@DTYPES
def test_compatibility_objective(golden: Any, dtype: str) -> None:
    default = {"float64": 1e-9, "float32": 1e-4}[dtype]
    hyper = golden.hyper
    old, new = tensor(golden, "h_old", dtype), tensor(golden, "h_new", dtype)
    labels = torch.from_numpy(golden["labels"])
    leaves = {name: tensor(golden, name, dtype).requires_grad_() for name in ("Wb", "bb", "Wf", "bf")}
    backward_new = torch.nn.functional.linear(new, leaves["Wb"], leaves["bb"])
    forward_old = torch.nn.functional.linear(old, leaves["Wf"], leaves["bf"])
    golden.assert_close("B_new", backward_new, dtype, default)
    golden.assert_close("F_old", forward_old, dtype, default)
    rows = (old, backward_new, forward_old)
    options = {
        "weight": leaves["Wb"],
        "labels": labels,
        "threshold": hyper["lam"],
        "sharpness": hyper["alpha"],
        "temperature": hyper["tau"],
        "weights": (hyper["w1"], hyper["w2"], hyper["w3"]),
    }
    found, averaged = (compatibility_objective(*rows, **options, reduction=name) for name in ("sum", "mean"))
    parts = {
        "L_B": found.backward,
        "L_F": found.forward,
        "L_B_elementwise_mean": averaged.backward,
        "L_F_elementwise_mean": averaged.forward,
        "L_contr_F_B": found.contrastive_new,
        "L_contr_F_old": found.contrastive_old,
        "L_C": found.contrastive,
        "L_lambda": found.orthogonality,
        "total": found.total,
    }
    for name, value in parts.items():
        golden.assert_close(name, value, dtype, default)
    found.total.backward()
    for name, leaf in leaves.items():
        golden.assert_close(f"grad_{name}", leaf.grad, dtype, default)
