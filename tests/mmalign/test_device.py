"""Devices, precisions, and the measurement that chooses one."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor, nn

from mmalign.device import DTYPES, fastest_cpu_dtype, resolve_device, resolve_dtype
from mmalign.errors import InputError


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_the_fastest_kind_present(cuda: bool, mps: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert resolve_device().type == expected


def test_named_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_device("cpu") == resolve_device(torch.device("cpu")) == torch.device("cpu")
    absent = "mps" if not torch.backends.mps.is_available() else "cuda"
    for name in ("abacus", "cpu:x", f"{absent}:0"):
        with pytest.raises(InputError, match="use cpu, cuda or mps") as caught:
            resolve_device(name)
        assert repr(name) in str(caught.value)
        assert "\n" not in str(caught.value)

    def refuse(*_: object, **__: object) -> Tensor:
        raise AssertionError

    monkeypatch.setattr(torch, "empty", refuse)  # torch says nothing
    with pytest.raises(InputError, match="AssertionError"):
        resolve_device("cpu")


def test_dtypes() -> None:
    for name, dtype in DTYPES.items():
        assert resolve_dtype(name) is resolve_dtype(dtype) is dtype is getattr(torch, name)
    for bad in ("half", torch.float64, torch.int8):
        with pytest.raises(InputError, match="float32, bfloat16, float16, or auto"):
            resolve_dtype(bad)


@pytest.mark.parametrize(
    ("slow", "expected"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (None, torch.float32)]
)
def test_the_faster_dtype_is_chosen_and_nothing_rounded(slow: torch.dtype | None, expected: torch.dtype) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    module.register_buffer("shift", torch.randn(4), persistent=False)
    before = {
        name: (t.data_ptr(), t.detach().clone()) for name, t in [*module.named_parameters(), *module.named_buffers()]
    }
    seen = []

    def forward(pixels: Tensor) -> Tensor:
        assert {p.dtype for p in module.parameters()} == {pixels.dtype}
        seen.append(pixels.dtype)
        time.sleep(0.05 if pixels.dtype == slow else 0.01)
        return module(pixels)

    assert fastest_cpu_dtype(module, forward, torch.zeros(2, 3, 8, 8)) == expected
    assert set(seen) == {torch.float32, torch.bfloat16}
    after = dict([*module.named_parameters(), *module.named_buffers()])
    assert set(after) == set(before)
    for name, tensor in after.items():
        assert tensor.data_ptr() == before[name][0]
        assert torch.equal(tensor, before[name][1])
        assert tensor.dtype == before[name][1].dtype
    module(torch.zeros(1, 3, 8, 8)).sum().backward()  # can be trained still


def test_weights_come_back_after_a_failure() -> None:
    module = nn.Conv2d(3, 4, 3)
    before = module.weight.detach().clone()

    def forward(pixels: Tensor) -> Tensor:
        if pixels.dtype == torch.bfloat16:
            raise RuntimeError("no kernel")
        return module(pixels)

    with pytest.raises(RuntimeError, match="no kernel"):
        fastest_cpu_dtype(module, forward, torch.zeros(1, 3, 8, 8))
    assert torch.equal(module.weight, before)
