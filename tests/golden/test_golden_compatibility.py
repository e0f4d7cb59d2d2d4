"""Backward-compatible representations against their golden files. Tolerances of the card, section 8."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

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
        with_eps = slerp(pad_columns(query_old, len(theirs)), query_new @ theirs, alpha, eps=golden.hyper["eps"])
        golden.assert_close("q_slerp", with_eps, dtype, default, where=i)
