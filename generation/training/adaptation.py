"""What of a denoiser is trained, and how that is saved, restored, averaged and handed out: a LoRA, or everything."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mmalign.files import save_tensors, whole_file

from ..export import DIFFUSERS_FILE, export_lora
from ..lora import add_lora, load_lora_state, lora_disabled
from .configuration import RunConfig
from .hardware import training_dtype

__all__ = ["Adaptation", "FullAdaptation", "LoraAdaptation", "MovingAverage", "make_adaptation"]


class Adaptation(Protocol):
    """What is trained.

    Attributes:
        network: the denoiser; all that is trained is among its parameters, and needs gradients.
        parameters: those that are trained.
    """

    network: nn.Module
    parameters: list[nn.Parameter]

    def reference(self) -> AbstractContextManager[nn.Module]:
        """The network as it was before training, without gradients."""

    def save(self, folder: Path) -> None:
        """For a checkpoint, in files that can be used as they are."""

    def load(self, folder: Path) -> None:
        """What `save` wrote, bit for bit."""

    def export(self, folder: Path, notes: Mapping[str, str], state: dict[str, Tensor] | None = None) -> list[Path]:
        """What others load, with notes; `state` holds the network's weights where no process has them all."""


class LoraAdaptation:
    """Float32 adapters on a frozen network; the reference is the same network with the adapters off."""

    def __init__(self, network: nn.Module, config: RunConfig, family: str) -> None:
        self.network, self._family, self._name = network, family, config.output.name
        self.parameters = add_lora(
            network,
            rank=config.rank,
            alpha=config.alpha,
            targets=config.targets,
            dropout=config.lora_dropout,
            dora=config.dora,
            rslora=config.rslora,
            seed=config.seed,
        )

    @contextmanager
    def reference(self) -> Iterator[nn.Module]:
        """The network as it was before training."""
        with torch.no_grad(), lora_disabled(self.network):
            yield self.network

    def save(self, folder: Path) -> None:
        """The file for diffusers, so that every checkpoint can be used as it is."""
        export_lora(self.network, folder, formats=("diffusers",))

    def load(self, folder: Path) -> None:
        """What `save` wrote, bit for bit."""
        state = load_file(folder / DIFFUSERS_FILE)
        load_lora_state(self.network, {key.partition(".")[2]: value for key, value in state.items()})

    def export(self, folder: Path, notes: Mapping[str, str], state: dict[str, Tensor] | None = None) -> list[Path]:
        """diffusers and kohya files, the latter named like the run."""
        return list(export_lora(self.network, folder, name=self._name, metadata=notes).values())


class FullAdaptation:
    """All weights in float32; the reference, where a method needs one, is a frozen copy in the run's precision."""

    def __init__(self, network: nn.Module, config: RunConfig, family: str, *, reference: bool) -> None:
        self.network = network
        self._component = "unet" if family in ("sdxl", "sd15") else "transformer"
        self._copy: nn.Module | None = None
        if reference:
            device = next(network.parameters()).device
            self._dtype, self._device = training_dtype(config, device), device.type
            self._copy = copy.deepcopy(network).requires_grad_(False).eval()
            for module in self._copy.modules():
                # The network runs under autocast, which keeps normalisations in float32 and rounds all other weights.
                # Rounded alike, the copy answers bit for bit what the network did before its first step.
                if not isinstance(module, nn.GroupNorm | nn.LayerNorm):
                    for parameter in module.parameters(recurse=False):
                        parameter.data = parameter.data.to(self._dtype)
        network.requires_grad_(True)
        self.parameters = list(network.parameters())

    @contextmanager
    def reference(self) -> Iterator[nn.Module]:
        """The network as it was before training."""
        assert self._copy is not None, "this method declared no need of a reference"
        half = self._dtype != torch.float32
        with torch.no_grad(), torch.autocast(self._device, self._dtype if half else None, enabled=half):
            yield self._copy

    def save(self, folder: Path) -> None:
        """As it is exported, so that every checkpoint can be used as it is."""
        self.export(folder, {})

    def load(self, folder: Path) -> None:
        """What `save` wrote, bit for bit."""
        self.network.load_state_dict(load_file(self._weights(folder)))

    def export(self, folder: Path, notes: Mapping[str, str], state: dict[str, Tensor] | None = None) -> list[Path]:
        """A folder `unet` (or `transformer`) in diffusers' layout, float32."""
        weights = self._weights(folder)
        self.network.save_config(weights.parent)  # type: ignore[operator]
        with whole_file(weights) as fresh:
            save_tensors(self.network.state_dict() if state is None else state, fresh, {"format": "pt", **notes})
        return [weights.parent]

    def _weights(self, folder: Path) -> Path:
        from diffusers.utils import SAFETENSORS_WEIGHTS_NAME

        return folder / self._component / SAFETENSORS_WEIGHTS_NAME


def make_adaptation(network: nn.Module, config: RunConfig, family: str, *, reference: bool) -> Adaptation:
    """Make what the settings name trainable."""
    if config.adaptation == "lora":
        return LoraAdaptation(network, config, family)
    return FullAdaptation(network, config, family, reference=reference)


class MovingAverage:
    """Exponential moving average of the trained weights (diffusers' EMAModel), usable in their place for a while."""

    def __init__(self, parameters: list[nn.Parameter], decay: float) -> None:
        from diffusers.training_utils import EMAModel

        # All at once: one by one, the 1,120 tensors of SDXL's LoRA are some 3,000 launches a step. But that takes
        # room for one more copy, which a full fine-tune does not have.
        at_once = sum(parameter.numel() for parameter in parameters) < 500_000_000
        self._parameters, self._ema = parameters, EMAModel(parameters, decay=decay, foreach=at_once)

    def step(self) -> None:
        """After each optimiser step."""
        self._ema.step(self._parameters)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The averaged weights in the network."""
        self._ema.store(self._parameters)
        self._ema.copy_to(self._parameters)
        try:
            yield
        finally:
            self._ema.restore(self._parameters)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return self._ema.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self._ema.load_state_dict(state)
        self._ema.to(device=self._parameters[0].device)
