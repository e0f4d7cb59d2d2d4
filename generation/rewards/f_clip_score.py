"""F-CLIPScore of CLIP4DM, arXiv 2412.18404: how much of the prompt the image contradicts, word by word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.checks import in_range
from mmalign.word_attribution import EPS, LAYERS, TEMPLATE, AttributedWords, attributed_words, f_clip_score

from .cosine import CosineReward
from .reward import Reward

if TYPE_CHECKING:
    from mmalign.encoders import Encoder
    from mmalign.imaging import ImagePreprocessing

__all__ = ["FCLIPScore"]


class FCLIPScore(Reward):
    """(1 - max(cos, 0)) times the sum of the scores of the words that the image contradicts; at most 0, 0 is best.

    Costs a backward pass through the last text layers a prompt: in the paper 10 to 20 % fewer pairs a second than the
    cosine. `mmalign.word_attribution` gives the words themselves.

    Gradients reach the pixels, through a second backward pass. They are exactly 0 where no word is flagged, and the
    score jumps by about eps where a word crosses it; to train on, the cosine is the better reward. Use this one to
    filter and to pick.

    Attributes:
        encoder: a CLIP whose text tower is causal.
        eps: words that score below are flagged.
        layers: of the text tower, from the last.
        template: in front of every prompt.
    """

    name = "f-clipscore"
    differentiable = True
    range = (None, 0.0)

    def __init__(
        self,
        encoder: Encoder,
        *,
        eps: float = EPS,
        layers: int | None = LAYERS,
        template: str = TEMPLATE,
        preprocessing: ImagePreprocessing | None = None,
    ) -> None:
        """Take a CLIP of open_clip or transformers.

        Args:
            encoder: see `mmalign.word_attribution.word_attribution`; its weights are frozen.
            eps: at most 0; the default is for LAION's ViT-H/14. `mmalign.word_attribution.calibrate_eps` finds one.
            layers: how many of the last text layers count; `None` for all.
            template: ends in a space, or is empty.
            preprocessing: replaces the encoder's own.

        Raises:
            InputError: an encoder of another kind, or an option out of range.
        """
        in_range("eps", eps, high=0)
        self._cosine = CosineReward(encoder, preprocessing=preprocessing)
        self.encoder, self.eps, self.layers, self.template = encoder, float(eps), layers, template
        with torch.no_grad():
            attributed_words(encoder, torch.ones(1, encoder.dim), ["a"], template=template, layers=layers)
        settings = f"eps {self.eps!r}, layers {layers}, template {template!r}"
        self.fingerprint = f"F-CLIPScore of {self._cosine.view}, {settings}"

    def score(self, images: Sequence[Float[Tensor, "3 height width"]], prompts: Sequence[str]) -> Float[Tensor, " n"]:
        """F-CLIPScores."""
        return self.score_terms(images, prompts)[0]

    def score_terms(
        self, images: Sequence[Float[Tensor, "3 height width"]], prompts: Sequence[str]
    ) -> tuple[Float[Tensor, " n"], dict[str, Float[Tensor, " n"] | Sequence[float]]]:
        """F-CLIPScores; "cosine", of the prompt behind its template, and "flagged", the number of words below eps."""
        embeds = self._cosine.image_embeds(images)
        found = attributed_words(self.encoder, embeds, prompts, template=self.template, layers=self.layers)
        plain = [_without_punctuation(one) for one in found]
        scores = [f_clip_score(words, one.cosine, self.eps) for words, one in zip(plain, found, strict=True)]
        flagged = torch.stack([(words < self.eps).sum() for words in plain]).float()
        return torch.stack(scores), {"cosine": torch.stack([one.cosine for one in found]), "flagged": flagged}


def _without_punctuation(found: AttributedWords) -> Float[Tensor, " words"]:
    kept = [place for place, word in enumerate(found.words) if not word.is_punctuation]
    return found.scores[torch.tensor(kept, dtype=torch.long, device=found.scores.device)]
