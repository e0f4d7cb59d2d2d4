"""Published reward scores as functions of embeddings, head weights and logits; differentiable, in any float type.

Embeddings are given as the encoder leaves them, of any length. What separates implementations is named where it
matters: whether a cosine is clamped, what it is multiplied by. None is rescaled here for training.

CLIPScore: arXiv 2104.08718 and torchmetrics; PickScore: 2305.01569; HPS v2: 2306.09341; the relative score: 2509.06942;
ImageReward: 2304.05977; VQAScore: 2404.01291; linear aesthetic heads: LAION.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, normalize

__all__ = [
    "Activation",
    "Convention",
    "Layers",
    "clip_score",
    "clip_score_of_cosine",
    "cosine_score",
    "fold_linear_stack",
    "hps_score",
    "image_reward_score",
    "linear_stack",
    "linear_stack_score",
    "mean_clip_score",
    "pick_probabilities",
    "pick_score",
    "relative_score",
    "vqa_score",
]

Convention: TypeAlias = Literal["hessel", "percent"]
Activation: TypeAlias = Literal["relu"] | None
Layers: TypeAlias = Sequence[tuple[Float[Tensor, "out in"], Float[Tensor, " out"]]]

_IMAGE_REWARD_MEAN, _IMAGE_REWARD_STD = 0.16717362830052426, 1.0333394966054072


def cosine_score(image_embeds: Float[Tensor, "*n dim"], text_embeds: Float[Tensor, "*n dim"]) -> Float[Tensor, "*n"]:
    """cos(i, t) in [-1, 1], a row at a time; one text for all images broadcasts."""
    return (normalize(image_embeds, dim=-1) * normalize(text_embeds, dim=-1)).sum(dim=-1)


def clip_score(
    image_embeds: Float[Tensor, "*n dim"],
    text_embeds: Float[Tensor, "*n dim"],
    *,
    convention: Convention = "hessel",
) -> Float[Tensor, "*n"]:
    """CLIPScore of pairs.

    Args:
        image_embeds: of images.
        text_embeds: of captions; "hessel" has each begin with "A photo depicts ".
        convention: "hessel", 2.5 max(cos, 0) in [0, 2.5], has no gradient below a cosine of 0. "percent", 100 cos in
            [-100, 100], is what torchmetrics gives for a pair and what text-to-image papers mean, not clamped.
    """
    return clip_score_of_cosine(cosine_score(image_embeds, text_embeds), convention)


def clip_score_of_cosine(cosine: Float[Tensor, "*n"], convention: Convention = "hessel") -> Float[Tensor, "*n"]:
    """As `clip_score`, where the cosine is there already."""
    return 2.5 * cosine.clamp(min=0) if convention == "hessel" else 100 * cosine


def mean_clip_score(scores: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """CLIPScore of a set, of either convention: max(mean, 0), as torchmetrics clamps it."""
    return scores.mean().clamp(min=0)


def pick_score(
    image_embeds: Float[Tensor, "*n dim"], text_embeds: Float[Tensor, "*n dim"], logit_scale: Float[Tensor, ""]
) -> Float[Tensor, "*n"]:
    """PickScore, exp(logit_scale) cos, about 18 to 24 with the published weights.

    `logit_scale` is the logarithm that the weights hold.
    """
    return logit_scale.exp() * cosine_score(image_embeds, text_embeds)


def pick_probabilities(
    image_embeds: Float[Tensor, "candidates dim"], text_embeds: Float[Tensor, " dim"], logit_scale: Float[Tensor, ""]
) -> Float[Tensor, " candidates"]:
    """Which of the candidates for one prompt people prefer: the softmax of their PickScores."""
    return pick_score(image_embeds, text_embeds, logit_scale).softmax(dim=-1)


def hps_score(image_embeds: Float[Tensor, "*n dim"], text_embeds: Float[Tensor, "*n dim"]) -> Float[Tensor, "*n"]:
    """HPS v2 and v2.1: the cosine itself, without logit scale, about 0.2 to 0.4 with the published weights.

    The versions are not comparable with each other, nor are scores of different prompts.
    """
    return cosine_score(image_embeds, text_embeds)


def relative_score(
    image_embeds: Float[Tensor, "*n dim"],
    text_embeds: Float[Tensor, "*n dim"],
    negative_text_embeds: Float[Tensor, "*n dim"],
    *,
    k: float = 0.15,
) -> Float[Tensor, "*n"]:
    """SRPO's score of an image between two prompts, i . ((1 + k) t_pos - t_neg), in [-2 - k, 2 + k].

    What both prompts reward alike, a look that is no part of either, cancels but for `k`.
    """
    texts = (1 + k) * normalize(text_embeds, dim=-1) - normalize(negative_text_embeds, dim=-1)
    return (normalize(image_embeds, dim=-1) * texts).sum(dim=-1)


def linear_stack(
    features: Float[Tensor, "*n in"], layers: Layers, *, activation: Activation = None
) -> Float[Tensor, "*n"]:
    """Linear layers down to one number, with `activation` between them; `layers` are weight and bias, first to last."""
    for number, (weight, bias) in enumerate(layers):
        if number and activation == "relu":
            features = features.relu()
        features = linear(features, weight, bias)
    return features.squeeze(-1)


def linear_stack_score(
    features: Float[Tensor, "*n in"], layers: Layers, *, activation: Activation = None
) -> Float[Tensor, "*n"]:
    """Aesthetic score: `linear_stack` of the image embedding with its length made 1."""
    return linear_stack(normalize(features, dim=-1), layers, activation=activation)


def fold_linear_stack(layers: Layers) -> tuple[Float[Tensor, "1 in"], Float[Tensor, " 1"]]:
    """The one layer that equals layers with no activation between them (dropout is off in evaluation)."""
    weight, bias = layers[0]
    for next_weight, next_bias in layers[1:]:
        weight, bias = next_weight @ weight, next_weight @ bias + next_bias
    return weight, bias


def image_reward_score(raw: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """ImageReward 1.0 from what its head gives: mean 0 and deviation 1 over the authors' validation images."""
    return (raw - _IMAGE_REWARD_MEAN) / _IMAGE_REWARD_STD


def vqa_score(logits: Float[Tensor, "n length vocabulary"], labels: Int[Tensor, "n length"]) -> Float[Tensor, " n"]:
    """VQAScore in [0, 1]: exp of the mean log-probability of the answer's tokens ("Yes" and what ends it).

    Args:
        logits: of the decoder at the answer's positions.
        labels: the answer's tokens, -100 where a position does not count. A row without any gives NaN.
    """
    losses = cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
    return torch.exp(-losses.sum(dim=1) / (labels != -100).sum(dim=1))
