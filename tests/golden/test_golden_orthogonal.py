"""Orthogonal parametrisations and the losses of OCA against their golden files."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmalign.orthogonal import ORTHOGONAL_MAPS, OrthogonalLinear, orthogonal_weight, skew_exponential
from mmalign.orthogonal_compatibility import class_prototypes, oca_forward, oca_loss

FLOAT32 = 2e-5  # where the json states no tolerance for float32 inputs
FLOAT64 = 1e-9
DTYPES = pytest.mark.parametrize("dtype", ["float64", "float32"])


def tensor(golden: Any, name: str, dtype: str, *, grad: bool = False) -> Tensor:
    return torch.from_numpy(golden[name].astype(dtype)).requires_grad_(grad)


def cases(golden: Any) -> list[tuple[str, Any]]:
    """Prefix and map of every case; the prefix names the map."""
    prefixes = [name.removesuffix("_weight") for name in golden.names if name.endswith("_weight")]
    return [(prefix, next(map_ for map_ in ORTHOGONAL_MAPS if map_ in prefix)) for prefix in prefixes]


@pytest.mark.golden("bc_orthogonal_param")
@DTYPES
def test_orthogonal_weight(golden: Any, dtype: str) -> None:
    default = FLOAT64 if dtype == "float64" else FLOAT32
    assert cases(golden)
    for prefix, orthogonal_map in cases(golden):
        raw = tensor(golden, f"{prefix}_raw", dtype, grad=True)
        base = tensor(golden, f"{prefix}_base", dtype) if f"{prefix}_base" in golden else None
        weight = orthogonal_weight(raw, orthogonal_map=orthogonal_map, base=base)
        golden.assert_close(f"{prefix}_weight", weight, dtype, default)
        (weight * tensor(golden, f"{prefix}_C", dtype)).sum().backward()
        golden.assert_close(f"{prefix}_grad", raw.grad, dtype, default)
    rotation = skew_exponential(tensor(golden, "skew_upper_entries", dtype))
    golden.assert_close("expm_skew", rotation, dtype, default)
    assert torch.linalg.det(rotation) > 0


@pytest.mark.golden("bc_orthogonal_param")
@DTYPES
def test_orthogonal_layer_is_the_function(golden: Any, dtype: str) -> None:
    """The layer at the stored numbers: its weight, its output, and the gradient of its own parameter."""
    default = FLOAT64 if dtype == "float64" else FLOAT32
    tested = 0
    for prefix, orthogonal_map in cases(golden):
        rows, columns = golden[f"{prefix}_raw"].shape
        if rows != columns or f"{prefix}_base" not in golden:
            continue
        tested += 1
        base = tensor(golden, f"{prefix}_base", dtype)
        layer = OrthogonalLinear(rows, orthogonal_map=orthogonal_map, base=base)
        np.testing.assert_array_equal(layer.weight.detach().numpy(), base.numpy())
        original = layer.parametrizations.weight.original  # type: ignore[union-attr]
        with torch.no_grad():
            original.copy_(tensor(golden, f"{prefix}_raw", dtype))  # type: ignore[operator]
        golden.assert_close(f"{prefix}_weight", layer(torch.eye(rows, dtype=base.dtype)).T, dtype, default)
        (layer.weight * tensor(golden, f"{prefix}_C", dtype)).sum().backward()
        golden.assert_close(f"{prefix}_grad", original.grad, dtype, default)
    if not tested:
        pytest.skip("no square case with a base")
    golden.ignore(*golden.names)


@pytest.mark.golden("bc_oca_loss")
@DTYPES
def test_oca(golden: Any, dtype: str) -> None:
    default = FLOAT64 if dtype == "float64" else FLOAT32
    hyper = golden.hyper
    old_dim, classes = hyper["d_old"], hyper["num_classes"]

    def stored(name: str, *, grad: bool = False) -> Tensor:
        return tensor(golden, name, dtype, grad=grad)

    old_labels, labels = (torch.from_numpy(golden[name].astype(np.int64)) for name in ("old_train_labels", "labels"))
    prototypes = class_prototypes(stored("old_train_features"), old_labels, classes)
    golden.assert_close("prototypes", prototypes, dtype, default)

    layer = OrthogonalLinear(old_dim + hyper["k_extra"], orthogonal_map="matrix_exp", base=stored("orth_base"))
    raw = layer.parametrizations.weight.original  # type: ignore[union-attr]
    with torch.no_grad():
        raw.copy_(stored("orth_raw"))  # type: ignore[operator]
        layer.bias.copy_(stored("orth_bias"))
    golden.assert_close("orth_weight", layer.weight, dtype, default)
    features, classifier = stored("backbone_features", grad=True), stored("fc_out_weight", grad=True)
    passed = oca_forward(features, layer, classifier, old_dim)
    for name, part in zip(passed._fields, passed, strict=True):
        golden.assert_close(name, part, dtype, default)

    loss = oca_loss(
        features,
        labels,
        stored("prototypes"),
        layer,
        classifier,
        label_smoothing=hyper["label_smoothing"],
        weights=tuple(hyper["weights"][name] for name in ("ce", "bct", "cos")),
    )
    for name, term in zip(loss._fields, loss, strict=True):
        golden.assert_close(f"loss_{name}", term, dtype, default)
    loss.total.backward()
    default = FLOAT64 if dtype == "float64" else 10 * FLOAT32  # weighted by up to 10
    golden.assert_close("grad_backbone_features", features.grad, dtype, default)
    golden.assert_close("grad_orth_raw", raw.grad, dtype, default)
    golden.assert_close("grad_orth_bias", layer.bias.grad, dtype, default)
    golden.assert_close("grad_fc_out_weight", classifier.grad, dtype, default)
