"""Attention probabilities of CLIP's text towers, kept where a gradient can be taken with respect to them.

Towers use fused attention, which has no probabilities, or return none. Here they are computed explicitly, and are the
very tensors that the values are multiplied with.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..errors import InputError

if TYPE_CHECKING:
    from .encoder import Encoder

__all__ = ["AttendedTexts", "attention_undefined", "differentiable_from", "explicit_attention", "kept_attention"]


class AttendedTexts(NamedTuple):
    """A batch of texts as a causal tower has read them.

    Attributes:
        features: as `Encoder.text_features`, in the graph of `attention`.
        attention: probabilities of the layers asked for, in rising order; row i is what token i looks at.
        end: position of each text's end token, from which its features are taken. Position 0 is the begin token.
        full: whether the text may have been cut, as it fills the window.
    """

    features: Float[Tensor, "batch dim"]
    attention: list[Float[Tensor, "batch heads tokens tokens"]]
    end: Int[Tensor, " batch"]
    full: list[bool]


def attention_undefined(encoder: Encoder, why: str) -> InputError:
    """What to raise for an encoder whose texts cannot be read so."""
    return InputError(
        f"attention of the text tower of {encoder.spec!r} cannot be read word by word: {why}; supported are CLIPs "
        "whose text tower is causal and ends in an end token, open_clip:MODEL/TAG (not CoCa, not SigLIP) and "
        "transformers:openai/clip-vit-base-patch32 and its like"
    )


@contextlib.contextmanager
def differentiable_from(block: nn.Module) -> Iterator[None]:
    """Have a graph from what `block` takes on, also where no weight is trained; nothing before it is in the graph."""

    def leaf(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if arguments:
            return (arguments[0].detach().requires_grad_(), *arguments[1:]), named
        return arguments, {**named, "hidden_states": named["hidden_states"].detach().requires_grad_()}

    handle = block.register_forward_pre_hook(leaf, with_kwargs=True)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        handle.remove()


@contextlib.contextmanager
def explicit_attention(layers: Sequence[nn.MultiheadAttention]) -> Iterator[list[Tensor]]:
    """Within the block the layers' self-attention is computed explicitly; the list yielded gets the probabilities."""
    found: list[Tensor] = []

    def attend(
        layer: nn.MultiheadAttention, arguments: tuple[Any, ...], named: dict[str, Any], _: Any
    ) -> tuple[Tensor, None]:
        states = arguments[0] if layer.batch_first else arguments[0].transpose(0, 1)
        batch, tokens, width = states.shape
        heads = (batch, tokens, 3, layer.num_heads, width // layer.num_heads)
        projected = nn.functional.linear(states, layer.in_proj_weight, layer.in_proj_bias).view(heads)
        queries, keys, values = projected.permute(2, 0, 3, 1, 4)
        logits = queries @ keys.transpose(-1, -2) * heads[-1] ** -0.5
        mask = named.get("attn_mask")
        if mask is not None:
            # Of the whole batch and all heads alike, or of every text and head, one after the other.
            logits = logits + (mask if mask.ndim == 2 else mask.view(batch, -1, tokens, tokens))
        found.append(logits.softmax(dim=-1))
        together = (found[-1] @ values).transpose(1, 2).reshape(batch, tokens, width)
        output = nn.functional.linear(together, layer.out_proj.weight, layer.out_proj.bias)
        return output if layer.batch_first else output.transpose(0, 1), None

    handles = [layer.register_forward_hook(attend, with_kwargs=True) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def kept_attention(layers: Sequence[nn.Module]) -> Iterator[list[Tensor | None]]:
    """Within the block the list yielded gets what the layers return beside their output: probabilities, or `None`."""
    found: list[Tensor | None] = []
    handles = [layer.register_forward_hook(lambda _, __, output: found.append(output[1])) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
