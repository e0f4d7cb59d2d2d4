"""Low-rank adapters on a diffusion model's denoiser: added, saved, restored and switched off.

The layers are peft's. What is added here is what training a half-precision model needs: adapter weights in float32,
whatever the model's precision, and an initialisation that is a function of its seed alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mmalign.checks import at_least
from mmalign.errors import InputError

__all__ = [
    "ADAPTER",
    "DEFAULT_TARGETS",
    "add_lora",
    "load_lora_state",
    "lora_config",
    "lora_disabled",
    "lora_state",
    "unwrap_model",
]

ADAPTER = "default"
DEFAULT_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
_WRAPPED = ("module", "_orig_mod", "_fsdp_wrapped_module")  # distributed, compiled, sharded
_layers_of: WeakKeyDictionary[nn.Module, tuple[Any, list[Any]]] = WeakKeyDictionary()


def add_lora(
    model: nn.Module,
    *,
    rank: int = 64,
    alpha: float | None = None,
    targets: Sequence[str] = DEFAULT_TARGETS,
    dropout: float = 0.0,
    dora: bool = False,
    rslora: bool = False,
    seed: int = 0,
) -> list[nn.Parameter]:
    """Freeze a denoiser and put a trainable low-rank update `scale * B A` beside each of the chosen layers.

    The model's output does not change: `B` starts at zero. The new weights are float32 also where the model is
    bfloat16 or float16, as steps of a usual learning rate are lost in the rounding of those. They depend on `seed`,
    `rank` and the layers' shapes only, not on the device or precision; the global random state is left as it was.
    Dropout, where used, draws from the global random state in every training step.

    Args:
        model: a diffusers denoiser (`pipeline.unet` or `pipeline.transformer`).
        rank: of the update; SDXL's default targets cost 1,451,520 parameters per rank.
        alpha: the update's scale is alpha / rank. `None` takes `rank`, the only value that every tool reads right.
        targets: ends of the layers' dotted names; linear layers and convolutions.
        dropout: probability in [0, 1) of dropping an input of `A`.
        dora: learn the magnitude of each output apart from its direction (https://arxiv.org/abs/2402.09353).
            Takes more time and memory, and exports to the diffusers format only.
        rslora: scale by alpha / sqrt(rank) (https://arxiv.org/abs/2312.03732); raise `rank` without lowering the
            learning rate.
        seed: of `A`, which is drawn from a normal distribution with standard deviation 1 / rank.

    Returns:
        The trainable parameters, in the order of the model's layers.

    Raises:
        InputError: an argument out of range, a target that fits no layer, or a model that has an adapter.
    """
    alpha = float(rank) if alpha is None else float(alpha)
    _check(model, rank, alpha, targets, dropout)
    try:
        from peft import LoraConfig
    except ImportError:
        raise InputError("adapters need peft, which is not installed; run: pip install 'mmalign[train]'") from None

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(targets),
        lora_dropout=dropout,
        use_dora=dora,
        use_rslora=rslora,
        init_lora_weights="gaussian",
    )
    model.requires_grad_(False)
    with torch.random.fork_rng({parameter.device for parameter in model.parameters() if parameter.is_cuda}):
        model.add_adapter(config, ADAPTER)  # type: ignore[operator]
    _initialise(model, rank, seed)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def lora_state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the adapter's weights: float32, on the CPU, keyed `<layer>.lora_A.weight` and so on.

    Args:
        model: what `add_lora` was applied to, or its wrapper for distributed training.

    Raises:
        InputError: the model has no adapter.
    """
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(unwrap_model(model), adapter_name=ADAPTER)
    return {
        key: value.detach().to("cpu", torch.float32, copy=True, memory_format=torch.contiguous_format)
        for key, value in state.items()
    }


def load_lora_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Set the adapter's weights, in place, to what `lora_state` returned.

    Raises:
        InputError: keys or shapes are not exactly those of the adapter; nothing has been changed then.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    model = unwrap_model(model)
    own = get_peft_model_state_dict(model, adapter_name=ADAPTER)
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    if missing or unexpected:
        first = f"{missing[0]!r} is missing" if missing else f"{unexpected[0]!r} is unexpected"
        raise InputError(
            f"these weights are of another adapter: {first} ({len(missing)} missing, {len(unexpected)} unexpected);"
            " use the targets and options that it was made with"
        )
    for key, value in own.items():
        if state[key].shape != value.shape:
            found, wanted = tuple(state[key].shape), tuple(value.shape)
            raise InputError(f"{key!r} has the shape {found}, not {wanted}; use the rank that it was made with")
    set_peft_model_state_dict(model, dict(state), adapter_name=ADAPTER)


def unwrap_model(model: nn.Module) -> nn.Module:
    """The adapted model inside the wrappers of distributed training and compilation.

    Raises:
        InputError: the model has no adapter.
    """
    # accelerate's own also looks for compiled parts, through all modules.
    while wrapped := next((model._modules[name] for name in _WRAPPED if name in model._modules), None):
        model = wrapped
    if ADAPTER not in getattr(model, "peft_config", {}):
        raise InputError("the model has no adapter to train; call add_lora first")
    return model


def lora_config(model: nn.Module) -> Any:
    """The adapter's `peft.LoraConfig`.

    Raises:
        InputError: the model has no adapter.
    """
    return unwrap_model(model).peft_config[ADAPTER]  # type: ignore[index]


@contextmanager
def lora_disabled(model: nn.Module) -> Iterator[None]:
    """Run the model as it was before `add_lora`: the frozen reference of a preference loss, for no memory.

    Nothing but the forward pass changes, so that this may be entered between a forward pass and its backward pass.
    With gradient checkpointing, run that backward pass outside, as it computes the forward pass anew.

    Args:
        model: what `add_lora` was applied to, or its wrapper for distributed training.
    """
    # Not the model's own `disable_adapters`: it also resets `requires_grad` of every weight of every adapter.
    layers = _adapted_layers(model)
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled


def _check(model: nn.Module, rank: int, alpha: float, targets: Sequence[str], dropout: float) -> None:
    at_least("rank", rank)
    if not alpha > 0:
        raise InputError(f"alpha is {alpha:g}; give a number above 0, such as the rank, which is the default")
    if not 0 <= dropout < 1:
        raise InputError(f"dropout is {dropout:g}; give a number in [0, 1)")
    if getattr(model, "peft_config", None):
        names = ", ".join(repr(name) for name in model.peft_config)  # type: ignore[union-attr]
        raise InputError(
            f"the model already has the adapter {names}; load it afresh, or drop it by `unload_lora_weights`"
        )
    if isinstance(targets, str) or not targets:
        raise InputError(f"targets must be a list of layer names, not {targets!r}")
    layers = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            known = ", ".join(sorted({_short_name(name) for name in layers})[:20])
            raise InputError(f"no linear layer or convolution is named {target!r}; there are: {known}")


def _short_name(name: str) -> str:
    """The end of a dotted name that begins with a word: `to_out.0`, `ff.net.0.proj`."""
    found = re.search(r"(?:ff\w*\.)?[^.\d][^.]*(?:\.\d+)*$", name)
    return found.group() if found else name


def _initialise(model: nn.Module, rank: int, seed: int) -> None:
    """Make peft's fresh weights float32 and draw `A` anew: peft rounds it to the model's precision."""
    generator = torch.Generator().manual_seed(seed)
    for layer in _adapted_layers(model):
        down, up = layer.lora_A[ADAPTER].float(), layer.lora_B[ADAPTER].float()
        start = torch.empty(down.weight.shape).normal_(std=1 / rank, generator=generator)
        with torch.no_grad():
            down.weight.copy_(start)
            up.weight.zero_()
            if ADAPTER in layer.lora_magnitude_vector:
                base = layer.get_base_layer().weight.float()
                magnitude = layer.lora_magnitude_vector[ADAPTER].float().weight
                magnitude.copy_(torch.linalg.vector_norm(base.flatten(1), dim=1).view_as(magnitude))
            elif layer.get_base_layer().weight.dtype in (torch.bfloat16, torch.float16):
                # peft would raise a copy of every input to float32 and multiply in float32. The same Parameters, used
                # in the input's precision, need neither those copies nor autocast with its float32 normalisations.
                layer.cast_input_dtype_enabled = False
                for module in (down, up):
                    module.__class__ = _LinearInInputDtype if isinstance(module, nn.Linear) else _Conv2dInInputDtype


class _LinearInInputDtype(nn.Linear):
    """Float32 weights that multiply in the precision of their input."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight.to(input.dtype))


class _Conv2dInInputDtype(nn.Conv2d):
    """Float32 weights that convolve in the precision of their input."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight.to(input.dtype), None)


def _adapted_layers(model: nn.Module) -> list[Any]:
    model, config = unwrap_model(model), lora_config(model)
    # Kept, as a walk through all of SDXL's modules takes 14 ms; another adapter has another configuration object.
    known = _layers_of.get(model)
    if known is None or known[0] is not config:
        from peft.tuners.lora import LoraLayer

        layers = [module for module in model.modules() if isinstance(module, LoraLayer) and ADAPTER in module.lora_A]
        known = _layers_of[model] = config, layers
    return known[1]
