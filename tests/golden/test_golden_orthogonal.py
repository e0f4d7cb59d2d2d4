"""Orthogonal parametrisations and the losses of OCA against their golden files."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmalign.orthogonal import ORTHOGONAL_MAPS, OrthogonalLinear, orthogonal_weight, skew_exponential

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
    assert tested
    golden.ignore(*golden.names)
