"""Soft tokens as what is trained: beside the LoRA and all weights of `adaptation`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from ..soft_tokens import SOFT_TOKENS_FILE, SoftTokens

__all__ = ["TokenAdaptation"]


class TokenAdaptation:
    """Float32 soft tokens in a frozen network; the reference is the same network with the tokens off.

    Attributes:
        network: has the tokens among its modules, as `soft_tokens`, and attached.
        parameters: tokens, and their time table.
    """

    def __init__(self, network: nn.Module, tokens: SoftTokens, family: str) -> None:
        self.network, self._family = network, family
        network.requires_grad_(False)
        self._tokens = tokens.to(next(network.parameters()).device)
        network.add_module("soft_tokens", self._tokens)  # where wrappers of distributed training find them
        self._attachment = self._tokens.attach(network)
        self.parameters = list(self._tokens.parameters())

    @contextmanager
    def reference(self) -> Iterator[nn.Module]:
        """The network as it was before training."""
        self._attachment.remove()
        try:
            with torch.no_grad():
                yield self.network
        finally:
            self._attachment = self._tokens.attach(self.network)

    def save(self, folder: Path) -> None:
        """As it is exported, so that every checkpoint can be used as it is."""
        self.export(folder, {})

    def load(self, folder: Path) -> None:
        """What `save` wrote, bit for bit."""
        self._tokens.load_state_dict(SoftTokens.load(folder / SOFT_TOKENS_FILE).state_dict())

    def export(self, folder: Path, notes: Mapping[str, str], state: dict[str, Tensor] | None = None) -> list[Path]:
        """`soft_tokens.safetensors`, which `generate` takes as an adapter."""
        return [self._tokens.save(folder / SOFT_TOKENS_FILE, {"backbone": self._family, **notes})]
