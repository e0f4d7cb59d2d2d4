"""Token states inside an encoder's towers: which layers there are, and how tokens become one row an item.

Layers count from 0. Image layer i is what block i gives (after the residual addition, before the final norm); for
networks without blocks of one shape, what timm calls their stages. Text layer 0 is what the first block takes (the
embeddings), text layer i what block i - 1 gives: image and text indices are offset by one in meaning. "output" stands
for the encoder's own raw features.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ..checks import one_of
from ..errors import InputError

if TYPE_CHECKING:
    from .encoder import Encoder

__all__ = ["POOLINGS", "Layer", "TokenStates", "block_list", "check_layer", "default_pooling", "tapped"]

Layer: TypeAlias = "int | Literal['output']"
POOLINGS = ("cls", "mean")


@dataclass(frozen=True, eq=False)
class TokenStates:
    """What one layer gives for a batch.

    Attributes:
        states: one vector a token, in the dtype of the tower.
        content: the tokens that mean pooling takes: patches, or all text tokens but padding.
        class_token: position of the class token, if the tower has one.
    """

    states: Float[Tensor, "batch tokens dim"]
    content: Bool[Tensor, "batch tokens"]
    class_token: int | None = None

    @classmethod
    def of_features(cls, features: Float[Tensor, "batch dim"]) -> TokenStates:
        """Features that are pooled already, as one token that is all there is."""
        return cls(features.unsqueeze(1), torch.ones(len(features), 1, dtype=torch.bool, device=features.device), 0)

    @classmethod
    def of_map(cls, spatial: Float[Tensor, "batch dim height width"]) -> TokenStates:
        """A feature map, every place of it a token."""
        states = spatial.flatten(2).transpose(1, 2)
        return cls(states, torch.ones(states.shape[:2], dtype=torch.bool, device=states.device))

    @classmethod
    def with_prefix(
        cls,
        prefix: Float[Tensor, "batch prefix dim"],
        patches: Float[Tensor, "batch patches dim"],
        *,
        class_token: bool = True,
    ) -> TokenStates:
        """Tokens that stand for no place (class token first, registers), then patches."""
        states = torch.cat([prefix, patches], dim=1)
        content = torch.arange(states.shape[1], device=states.device) >= prefix.shape[1]
        return cls(states, content.expand(len(states), -1), 0 if class_token else None)

    def pool(self, pooling: str) -> Float[Tensor, "batch dim"]:
        """One float32 row an item: "cls", the class token's state, or "mean", over the content tokens.

        Raises:
            InputError: another name, or "cls" where there is no class token.
        """
        one_of("pooling", pooling, POOLINGS)
        if pooling == "cls":
            if self.class_token is None:
                raise InputError("pooling is 'cls', and this tower has no class token; give 'mean'")
            return self.states[:, self.class_token].float()
        kept = self.states.float().masked_fill(~self.content.unsqueeze(-1), 0)
        return kept.sum(dim=1) / self.content.sum(dim=1, keepdim=True).clamp(min=1)


def check_layer(encoder: Encoder, modality: str, layer: Any) -> Layer:
    """A layer as it is called everywhere: "output", or counted from 0; negative numbers count from the last.

    Raises:
        InputError: the encoder has no such tower, or the tower no such layer.
    """
    encoder.require(modality)
    if isinstance(layer, str) and layer == "output":
        return "output"
    count = encoder.layer_count(modality)
    try:
        number = operator.index(layer)
    except TypeError:
        number = count
    if isinstance(layer, bool) or not -count <= number < count:
        there = f"0 to {count - 1} (or -{count} to -1) and 'output'" if count else "'output' alone"
        raise InputError(f"layer is {layer!r}; the {modality} tower of {encoder.spec!r} has {there}")
    return number % count


def default_pooling(encoder: Encoder, modality: str) -> Literal["cls", "mean"]:
    """The class token for images where there is one; else the mean, for texts over all tokens but padding."""
    encoder.require(modality)
    return "cls" if modality == "image" and encoder.has_class_token(modality) else "mean"


def block_list(model: nn.Module, count: int) -> Sequence[nn.Module]:
    """The blocks of a transformers model with `count` hidden layers; none where they are no plain list."""
    lists = (part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == count)
    return list(next(lists, ()))


@contextlib.contextmanager
def tapped(blocks: Sequence[nn.Module], layers: Collection[int]) -> Iterator[dict[int, Tensor]]:
    """Fill the dictionary yielded while the model runs: 0 is what the first block takes, i what block i - 1 gives."""
    found: dict[int, Tensor] = {}

    def take_input(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        found[0] = arguments[0] if arguments else named["hidden_states"]

    def take_output(layer: int, output: Any) -> None:
        found[layer] = output if isinstance(output, Tensor) else output[0]

    with contextlib.ExitStack() as hooks:
        for layer in layers:
            if layer == 0:
                handle = blocks[0].register_forward_pre_hook(take_input, with_kwargs=True)
            else:
                handle = blocks[layer - 1].register_forward_hook(lambda _, __, out, i=layer: take_output(i, out))
            hooks.callback(handle.remove)
        yield found
