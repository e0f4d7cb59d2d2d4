"""The reward that every encoder of images and texts is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from .reward import Reward

if TYPE_CHECKING:
    from mmalign.encoders import Encoder

__all__ = ["CosineReward"]


class CosineReward(Reward):
    """The cosine of image and prompt in [-1, 1], by an encoder of both.

    What is a good cosine differs between encoders: look at a few scores before a threshold is chosen.
    """

    differentiable: ClassVar[bool] = True

    def __init__(self, encoder: Encoder) -> None:
        """Raises InputError if the encoder takes no images or no texts."""
        encoder.require("image")
        encoder.require("text")
        self._encoder = encoder
        self.fingerprint = f"cosine of encoder {encoder.fingerprint}"

    def score(self, images: Sequence[Float[Tensor, "3 height width"]], prompts: Sequence[str]) -> Float[Tensor, " n"]:
        """Cosines; pixels are resized in float, so that gradients reach them."""
        encoder = self._encoder
        assert encoder.preprocessing is not None
        pixels = torch.stack([encoder.preprocessing(image) for image in images]).to(encoder.device, encoder.dtype)
        with torch.no_grad():
            texts = normalize(encoder.text_features(prompts).float(), dim=-1)
        return (normalize(encoder.image_features(pixels).float(), dim=-1) * texts).sum(dim=-1)
