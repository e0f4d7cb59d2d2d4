"""The one device and dtype policy.

`device=None` takes CUDA, then Apple's MPS, then the CPU. `dtype="auto"` is bfloat16 on a GPU that computes in it,
float16 on an older one, and float32 elsewhere; for image towers on a CPU a timed forward pass decides between the two.
Text towers stay in float32 on a CPU, where they are cheap, and features leave every encoder as float32.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .errors import InputError

__all__ = ["DTYPES", "fastest_cpu_dtype", "resolve_device", "resolve_dtype"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(device: str | torch.device | None = None) -> torch.device:
    """The device to run on; `None` picks the fastest kind present.

    Raises:
        InputError: torch cannot use the named device here.
    """
    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(1, device=resolved)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InputError(f"device {str(device)!r} is not usable here ({reason}); use cpu, cuda or mps") from None
    return resolved


def resolve_dtype(dtype: str | torch.dtype, device: torch.device | None = None) -> torch.dtype:
    """A weight precision by name: float32, bfloat16 or float16; with a device also "auto" (see the module).

    Raises:
        InputError: another name.
    """
    if dtype == "auto" and device is not None:
        if device.type != "cuda":
            return torch.float32
        with torch.cuda.device(device):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    if isinstance(dtype, torch.dtype):
        dtype = str(dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not known; use one of {', '.join(DTYPES)}, or auto")
    return DTYPES[dtype]


def fastest_cpu_dtype(
    module: nn.Module,
    forward: Callable[[Float[Tensor, "batch 3 height width"]], Tensor],
    example: Float[Tensor, "batch 3 height width"],
) -> torch.dtype:
    """bfloat16 where a timed `forward` with the weights of `module` in bfloat16 is at least 1.2 times faster.

    `autocast` gains little on a CPU; weights cast once gain up to 3 times on CPUs with AVX512-BF16 or AMX and lose on
    those that emulate it, hence the measurement. `module` is left as it was found, its tensors the very same: a round
    trip through bfloat16 would round them.
    """
    parameters = [(parameter, parameter.data) for parameter in module.parameters()]
    buffers = [(part, name, buffer) for part in module.modules() for name, buffer in part._buffers.items()]
    seconds = {}
    try:
        for dtype in (torch.float32, torch.bfloat16):
            module.to(dtype)
            inputs = example.to(dtype)
            with torch.inference_mode():
                forward(inputs)
                start = time.perf_counter()
                forward(inputs)
                seconds[dtype] = time.perf_counter() - start
    finally:
        for parameter, data in parameters:
            parameter.data = data
        for part, name, buffer in buffers:
            part._buffers[name] = buffer
    return torch.bfloat16 if seconds[torch.bfloat16] * 1.2 < seconds[torch.float32] else torch.float32
