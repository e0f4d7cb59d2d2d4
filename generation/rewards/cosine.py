"""The reward that every encoder of images and texts is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from .embedding import EmbeddingReward

if TYPE_CHECKING:
    from mmalign.encoders import Encoder
    from mmalign.imaging import ImagePreprocessing

__all__ = ["CosineReward"]


class CosineReward(EmbeddingReward):
    """The cosine of image and prompt in [-1, 1], by an encoder of both.

    What is a good cosine differs between encoders: look at a few scores before a threshold is chosen.
    """

    name = "cosine"
    range = (-1.0, 1.0)

    def __init__(self, encoder: Encoder, *, preprocessing: ImagePreprocessing | None = None) -> None:
        super().__init__(encoder, preprocessing=preprocessing)
        self.fingerprint = f"cosine of {self.view}"

    def score_embeds(
        self, image_embeds: Float[Tensor, "n dim"], text_embeds: Float[Tensor, "n dim"] | None
    ) -> Float[Tensor, " n"]:
        """Cosines."""
        assert text_embeds is not None
        return (image_embeds * text_embeds).sum(dim=-1)
