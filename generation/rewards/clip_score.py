"""CLIPScore, arXiv 2104.08718, in the two conventions that numbers are published in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.checks import one_of

from .cosine import CosineReward
from .scores import Convention, clip_score_of_cosine

if TYPE_CHECKING:
    from mmalign.encoders import Encoder
    from mmalign.imaging import ImagePreprocessing

__all__ = ["CLIPScore"]

_PREFIX = "A photo depicts "


class CLIPScore(CosineReward):
    """CLIPScore of image and prompt.

    "hessel" is the paper's: 2.5 max(cos, 0), every prompt begun with "A photo depicts ", with OpenAI's ViT-B/32
    (`open_clip:ViT-B-32/openai`). There is no gradient where the cosine is negative. "percent" is 100 cos as in
    torchmetrics, neither clamped nor prefixed; the "CLIP score" of text-to-image papers, with OpenAI's ViT-L/14 for
    the most part. To train on, take "percent" or `CosineReward`.

    Attributes:
        convention: "hessel" or "percent".
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        convention: Convention = "hessel",
        preprocessing: ImagePreprocessing | None = None,
    ) -> None:
        one_of("convention", convention, get_args(Convention))
        super().__init__(encoder, preprocessing=preprocessing)
        self.convention: Convention = convention
        self.name = "clipscore" if convention == "hessel" else "clipscore-percent"
        self.range = (0.0, 2.5) if convention == "hessel" else (-100.0, 100.0)
        self.fingerprint = f"{self.name} of {self.view}"

    def score_embeds(
        self, image_embeds: Float[Tensor, "n dim"], text_embeds: Float[Tensor, "n dim"] | None
    ) -> Float[Tensor, " n"]:
        """`scores.clip_score`."""
        return clip_score_of_cosine(super().score_embeds(image_embeds, text_embeds), self.convention)

    @torch.no_grad()
    def text_embeds(self, prompts: Sequence[str]) -> Float[Tensor, "n dim"]:
        """As `EmbeddingReward`; in the convention "hessel" of the prompts with their prefix."""
        prefix = _PREFIX if self.convention == "hessel" else ""
        return super().text_embeds([prefix + prompt for prompt in prompts])
