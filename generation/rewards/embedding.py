"""Rewards that see an image and its prompt as two vectors: all of the CLIP family, and what is learnt on top of it."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from .reward import Reward

if TYPE_CHECKING:
    from mmalign.encoders import Encoder
    from mmalign.imaging import ImagePreprocessing

__all__ = ["EmbeddingReward"]

_MOST_PROMPTS = 4096


class EmbeddingReward(Reward):
    """A function of the unit vectors that an encoder gives an image and its prompt.

    Encoder weights are frozen. Pixels are resized in float32, with gradient. The vectors of prompts are kept, those of
    the last 4,096 prompts.

    Attributes:
        encoder: of images, and of texts where `uses_text`.
        preprocessing: what an image goes through before the image tower.
    """

    differentiable = True

    def __init__(self, encoder: Encoder, *, preprocessing: ImagePreprocessing | None = None) -> None:
        """Take an encoder; `preprocessing` replaces its own.

        Raises:
            InputError: the encoder takes no images, or no texts though the prompt counts.
        """
        encoder.require("image")
        if self.uses_text:
            encoder.require("text")
        self.encoder = encoder
        self.preprocessing = preprocessing or encoder.preprocessing
        self._texts: dict[str, Tensor] = {}
        _ = encoder.fingerprint  # of the weights as they are
        encoder.model.requires_grad_(False)

    @property
    def view(self) -> str:
        """Says which encoder looks, and through what where that is not its own preprocessing: part of fingerprints."""
        assert self.preprocessing is not None
        if self.preprocessing == self.encoder.preprocessing:
            return f"encoder {self.encoder.fingerprint}"
        settings = json.dumps(self.preprocessing.to_dict(), sort_keys=True)
        return f"encoder {self.encoder.fingerprint} through {settings}"

    @abstractmethod
    def score_embeds(
        self, image_embeds: Float[Tensor, "n dim"], text_embeds: Float[Tensor, "n dim"] | None
    ) -> Float[Tensor, " n"]:
        """The score of unit vectors; `text_embeds` is `None` where the prompt does not count."""

    def score(self, images: Sequence[Float[Tensor, "3 height width"]], prompts: Sequence[str]) -> Float[Tensor, " n"]:
        """`score_embeds` of the images' and prompts' vectors; gradients reach the pixels."""
        texts = self.text_embeds(prompts) if self.uses_text else None
        return self.score_embeds(self.image_embeds(images), texts)

    def image_embeds(self, images: Sequence[Float[Tensor, "3 height width"]]) -> Float[Tensor, "n dim"]:
        """Unit float32 vectors of images in [0, 1], on the encoder's device, with gradient."""
        encoder, preprocessing = self.encoder, self.preprocessing
        assert preprocessing is not None
        # float32: a CPU has no antialiased resize in half precision
        pixels = torch.stack([preprocessing(image.to(encoder.device, torch.float32)) for image in images])
        return normalize(encoder.image_features(pixels.to(encoder.dtype)).float(), dim=-1)

    @torch.no_grad()
    def text_embeds(self, prompts: Sequence[str]) -> Float[Tensor, "n dim"]:
        """Unit float32 vectors of prompts, on the encoder's device; each prompt is encoded once."""
        fresh = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        if fresh:
            vectors = normalize(self.encoder.text_features(fresh).float(), dim=-1)
            self._texts.update(zip(fresh, vectors, strict=True))
        found = torch.stack([self._texts[prompt] for prompt in prompts])
        while len(self._texts) > _MOST_PROMPTS:
            del self._texts[next(iter(self._texts))]
        return found
