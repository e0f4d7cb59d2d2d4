"""D2-Align's corrected reward as functions of vectors (arXiv 2512.24146, eq. 5 to 8)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

__all__ = ["GuidedTexts", "guided_reward", "guided_text_embeds", "matched_gap", "prompt_numbers"]


class GuidedTexts(NamedTuple):
    """Prompts moved along b, against it, and both combined; the first two of norm 1, the last not renormalised."""

    e_plus: Float[Tensor, "n dim"]
    e_minus: Float[Tensor, "n dim"]
    e_tilde: Float[Tensor, "n dim"]


def guided_text_embeds(
    text_embeds: Float[Tensor, "n dim"], b: Float[Tensor, " dim"], omega: float = 1.5, *, normalize_text: bool = True
) -> GuidedTexts:
    """e+- = normalize(e_text +- b), and e~ = e- + omega (e+ - e-).

    Args:
        text_embeds: of prompts, of any length.
        b: the direction.
        omega: guidance scale; at 1, e~ is e+.
        normalize_text: give prompts length 1 before b is added, so that |b| means the same in every encoder. The paper
            does not say.
    """
    texts = normalize(text_embeds, dim=-1) if normalize_text else text_embeds
    e_plus, e_minus = normalize(texts + b, dim=-1), normalize(texts - b, dim=-1)
    return GuidedTexts(e_plus, e_minus, e_minus + omega * (e_plus - e_minus))


def guided_reward(
    image_embeds: Float[Tensor, "n dim"],
    text_embeds: Float[Tensor, "n dim"],
    b: Float[Tensor, " dim"],
    omega: float = 1.5,
    *,
    normalize_text: bool = True,
    renormalize: bool = True,
) -> Float[Tensor, " n"]:
    """R(image, prompt; b): the cosine of image and e~, in [-1, 1]. Stage 1 raises its mean over b, L1 = -mean R.

    Args:
        image_embeds: of any length.
        text_embeds: one row an image.
        b: the direction.
        omega: guidance scale.
        normalize_text: see `guided_text_embeds`.
        renormalize: a cosine, as the paper says; otherwise the inner product of the image's unit vector with e~.
    """
    guided = guided_text_embeds(text_embeds, b, omega, normalize_text=normalize_text).e_tilde
    if renormalize:
        guided = normalize(guided, dim=-1)
    return (normalize(image_embeds, dim=-1) * guided).sum(dim=-1)


def matched_gap(
    image_embeds: Float[Tensor, "n dim"],
    text_embeds: Float[Tensor, "n dim"],
    b: Float[Tensor, " dim"],
    omega: float = 1.5,
    *,
    normalize_text: bool = True,
    renormalize: bool = True,
) -> float:
    """Mean R of images with their own prompts, minus that with the prompts of others: how far R still sees the prompt.

    Over all pairs of rows; rows of equal text vectors are of one prompt and no mismatch. NaN where all are.
    """
    images = normalize(image_embeds, dim=-1)
    texts = guided_text_embeds(text_embeds, b, omega, normalize_text=normalize_text).e_tilde
    if renormalize:
        texts = normalize(texts, dim=-1)
    group = prompt_numbers(text_embeds)
    counts = torch.bincount(group).to(images)
    # Sums of inner products are inner products of sums.
    per_prompt = torch.zeros(len(counts), images.shape[1]).to(images).index_add_(0, group, images)
    same = (per_prompt[group] * texts).sum()
    every = images.sum(dim=0) @ texts.sum(dim=0)
    mismatched = len(images) ** 2 - float((counts**2).sum())
    if not mismatched:
        return math.nan
    return float((images * texts).sum(dim=-1).mean() - (every - same) / mismatched)


def prompt_numbers(text_embeds: Float[Tensor, "n dim"]) -> Int[Tensor, " n"]:
    """Rows of equal values by one number, from 0."""
    return torch.unique(text_embeds, dim=0, return_inverse=True)[1]
