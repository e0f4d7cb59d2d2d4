"""Adapters mixed in the space of weights and, as AlignProp's code does, in that of factors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from generation.lora_mixing import factor_space_mix, weight_space_mix


@pytest.mark.golden("ap_lora_mix")
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_lora_mix(golden, dtype):
    arrays = {
        name: torch.from_numpy(golden[name].copy()).to(getattr(torch, dtype)) for name in ("A1", "B1", "A2", "B2")
    }
    first, second = (arrays["A1"], arrays["B1"]), (arrays["A2"], arrays["B2"])
    assert len(first[0]) == golden.hyper["rank"]
    for row, alpha in enumerate(golden["alphas"].tolist()):
        mixes = {
            "factor_with_base": factor_space_mix([first], [alpha]),
            "factor_mix": factor_space_mix([first, second], [alpha, 1 - alpha]),
            "delta_with_base": weight_space_mix([first], [alpha]),
            "delta_mix": weight_space_mix([first, second], [alpha, 1 - alpha]),
        }
        for name, (a, b) in mixes.items():
            if dtype == "float64":
                golden.assert_close(name, b @ a, where=row)
            else:  # none is stated; products of a few numbers of the order of 1
                np.testing.assert_allclose(b @ a, golden[name][row], rtol=1e-5, atol=1e-5, err_msg=f"{name} {row}")
            assert len(a) == (2 if name == "delta_mix" else 1) * len(first[0])
