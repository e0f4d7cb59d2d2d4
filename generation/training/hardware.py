"""Processes, devices, precision and optimiser, as accelerate and torch make them."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mmalign.device import resolve_device, resolve_dtype
from mmalign.errors import InputError

from .configuration import RunConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = [
    "is_sharded",
    "make_accelerator",
    "make_optimizer",
    "make_schedule",
    "memory_told",
    "peak_memory",
    "training_dtype",
]

# Other ranks wait while one checks 335 GB of rows; the usual ten minutes would end the run.
_PATIENCE = timedelta(hours=48)


def make_accelerator(config: RunConfig) -> Accelerator:
    """accelerate's handle on all processes; `accelerate launch` decides how many there are.

    Raises:
        InputError: accelerate or a wanted logger is not installed, or the device is not usable.
    """
    needed = dict.fromkeys(("accelerate", "peft"), "'mmalign[train]'")
    needed |= {"tensorboard": "tensorboard"} if config.tensorboard else {}
    needed |= {"wandb": "wandb"} if config.wandb else {}
    for package, remedy in needed.items():
        if find_spec(package) is None:
            raise InputError(f"{package} is not installed; run: pip install {remedy}")
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.state import AcceleratorState

    device = resolve_device(config.device)
    distributed = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if not distributed:
        # accelerate keeps its first precision and device for the life of the process; a second trainer has its own.
        AcceleratorState._reset_state(reset_partial_state=True)
    precision = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "no"}[training_dtype(config, device)]
    if precision == "bf16" and config.adaptation != "full" and not config.dora:
        precision = "no"  # frozen weights are bfloat16 and what is added follows them: nothing is left to autocast
    if device.index is not None and not distributed:
        os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)
    else:
        os.environ.pop("ACCELERATE_TORCH_DEVICE", None)
    loggers = [name for name in ("tensorboard", "wandb") if getattr(config, name)]
    return Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=precision,
        log_with=loggers or None,
        project_dir=str(config.output) if loggers else None,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)],
    )


def training_dtype(config: RunConfig, device: torch.device) -> torch.dtype:
    """Of the frozen weights and the forward pass. float16 is refused without a GPU: it needs loss scaling."""
    dtype = resolve_dtype(config.dtype, device)
    if dtype == torch.float16 and device.type != "cuda":
        raise InputError("dtype float16 needs a CUDA device (loss scaling); use bfloat16 or float32")
    return dtype


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether no process holds the whole model (FSDP, DeepSpeed)."""
    return accelerator.distributed_type.name in ("FSDP", "DEEPSPEED")


def make_optimizer(config: RunConfig, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW over all parameters.

    Raises:
        InputError: bitsandbytes is missing.
    """
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": config.adam_betas,
        "weight_decay": config.weight_decay,
        "eps": config.adam_epsilon,
    }
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **settings)
    if find_spec("bitsandbytes") is None:
        raise InputError("optimizer adamw8bit needs bitsandbytes; run: pip install bitsandbytes, or use adamw")
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, **settings)


def make_schedule(config: RunConfig, optimizer: torch.optim.Optimizer, total: int) -> Any:
    """Learning rate by optimiser steps, of which the whole run has `total`, however many processes share it."""
    from diffusers.optimization import get_scheduler

    name = "constant_with_warmup" if config.lr_schedule == "constant" else config.lr_schedule
    return get_scheduler(name, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=total)


@contextmanager
def memory_told(config: RunConfig, device: torch.device) -> Iterator[None]:
    """Turn what no setting rules out beforehand, a full GPU, into an InputError with the ways out."""
    try:
        yield
    except torch.OutOfMemoryError:
        size, accumulation = config.batch_size, config.accumulation
        ways = [f"batch_size {size // 2} with accumulation {accumulation * 2}"] if size > 1 else []
        ways += [] if config.gradient_checkpointing else ["gradient_checkpointing"]
        ways += ["optimizer adamw8bit"] if config.optimizer == "adamw" else []
        raise InputError(
            f"training does not fit in the memory of {device}; give {' or '.join(ways) or 'a lower resolution'} "
            "(in another output, if this one has checkpoints)"
        ) from None


def peak_memory(device: torch.device) -> float:
    """GB (10^9 bytes): allocated on the GPU since the process began, or resident where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
