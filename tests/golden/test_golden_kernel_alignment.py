"""Kernel alignment: kernels, both loss terms and gradients of the published objective."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmalign.kernel_alignment import CosineKernel, GaussianKernel, PolynomialKernel, kernel_alignment_loss


@pytest.mark.golden("kernel_alignment")
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_kernel_alignment(golden: Any, dtype: str) -> None:
    hyper = golden.hyper
    z0, t = (torch.from_numpy(golden[name]).to(getattr(torch, dtype)) for name in ("z0", "t"))
    assert hyper["teacher_gamma"] == "1/d_t"
    # float32 is stated as relative; entries of gradients that nearly cancel have the rounding of their neighbours.
    limits = golden.tolerance(dtype) if dtype == "float64" else {**golden.tolerance(dtype), "atol": 1e-6}

    def close(name: str, found: torch.Tensor) -> None:
        assert found.dtype == getattr(torch, dtype)
        torch.testing.assert_close(found.detach().double(), torch.from_numpy(golden[name]).double(),
                                   rtol=limits["rtol"], atol=max(limits["atol"], 1e-15), msg=name)  # fmt: skip

    def kernel_of(kind: str, side: str, degree: int) -> tuple[Any, list[torch.Tensor]]:
        if kind == "cosine":
            return CosineKernel(), []
        if kind == "gaussian":
            sigma = torch.tensor(hyper[f"sigma_{side}"], dtype=z0.dtype, requires_grad=True)
            return GaussianKernel(sigma), [sigma]
        assert kind == "polynomial"
        given = (1 / t.shape[1], hyper["teacher_coef0"]) if side == "teacher" else (hyper["gamma"], hyper["coef0"])
        gamma, offset = (torch.tensor(value, dtype=z0.dtype, requires_grad=True) for value in given)
        return PolynomialKernel(offset, gamma, degree), [gamma, offset]

    for name, case in golden.meta["cases"].items():
        degree = case.get("degree", hyper["degree"])
        student, parameters = kernel_of(case["student_kernel"], "student", degree)
        teacher, _ = kernel_of(case["teacher_kernel"], "teacher", degree)
        z = torch.from_numpy(golden["z"]).to(z0.dtype).requires_grad_()
        found = kernel_alignment_loss(
            z, z0, t, student, teacher, weight=hyper["penalty_weight"], reg_weight=hyper["clean_weight"]
        )
        gradients = torch.autograd.grad(found.total, [z, *parameters])
        close(f"{name}__K_student", found.student)
        close(f"{name}__K_teacher", found.teacher)
        close(f"{name}__loss_align", found.align)
        close(f"{name}__loss_reg", found.reg)
        close(f"{name}__loss_total", found.total)
        close(f"{name}__grad_z", gradients[0])
        if parameters:
            close(f"{name}__grad_theta", gradients[1] if len(parameters) == 1 else torch.stack(gradients[1:]))
