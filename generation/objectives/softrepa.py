"""SoftREPA: a contrastive loss whose logits are denoising errors, arXiv 2503.08250.

An image, noised once, has to be denoised better under its own caption than under others. The form is that of the
released code (softrepa/SoftREPA): the factor in front of the exponential is not in the paper, and the temperature is a
constant there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

__all__ = ["SoftREPATerms", "denoising_logits", "denoising_matrix", "softrepa_loss"]


class SoftREPATerms(NamedTuple):
    """`loss` = mean(contrastive) + denoising_weight * mean(matched), and with `symmetric` halfway to the other CE.

    Attributes:
        contrastive: cross-entropy of each image over the captions.
        matched: error of each image under its own caption.
        logits: of all images under all captions; -inf where masked.
        ranked_right: whether an image's own caption has the smallest error of those that count.
    """

    loss: Float[Tensor, ""]
    contrastive: Float[Tensor, " b"]
    matched: Float[Tensor, " b"]
    logits: Float[Tensor, "b p"]
    ranked_right: Bool[Tensor, " b"]


def softrepa_loss(
    errors: Float[Tensor, "b p"],
    *,
    scale: float = 4.0,
    temperature: float = 0.07,
    denoising_weight: float = 0.0,
    symmetric: bool = False,
    mask: Bool[Tensor, "b p"] | None = None,
    targets: Int[Tensor, " b"] | None = None,
) -> SoftREPATerms:
    """L = mean_i CE(logits[i, :], target_i) + denoising_weight * mean_i E[i, target_i], logits of `denoising_logits`.

    The cross-entropy is of one row, so that rows may be given a few at a time (with `targets`): means over equal parts
    of a batch have the loss and the gradient of the whole.

    Pushing up the errors of other captions has no end: what images look like gets worse (FID of SDXL and SD3 in the
    paper) and counts are lost (GenEval's counting of SD3, 0.56 -> 0.29) while this loss still falls. End by a score of
    held-out images.

    Args:
        errors: E[i, j], mean squared error of image i denoised under caption j, from one noise and one timestep for
            the whole matrix; see `denoising_matrix`.
        scale: largest logit, above 0.
        temperature: of the exponential, above 0. Where errors are some ten times as large, gradients vanish.
        denoising_weight: of the images' own error: 0 for SD3, 10 for UNets in the released scripts.
        symmetric: also ask which image a caption belongs to, with equal weight; needs all rows at once. Not in the
            paper.
        mask: entries that do not count, such as another image's equal caption; an image's own must not be among them.
        targets: which caption is each image's own; by default caption i is image i's, and others may follow.
    """
    logits = denoising_logits(errors, scale=scale, temperature=temperature)
    counted = errors.detach()
    if mask is not None:
        logits, counted = logits.masked_fill(mask, -torch.inf), counted.masked_fill(mask, torch.inf)
    own = torch.arange(len(errors), device=errors.device) if targets is None else targets
    contrastive = cross_entropy(logits, own, reduction="none")
    matched = errors.to(logits.dtype).gather(1, own[:, None])[:, 0]
    loss = contrastive.mean()
    if symmetric:
        images = torch.arange(len(errors), device=errors.device)
        loss = (loss + cross_entropy(logits[:, own].T, images)) / 2
    ranked_right = counted.argmin(1) == own
    return SoftREPATerms(loss + denoising_weight * matched.mean(), contrastive, matched, logits, ranked_right)


def denoising_logits(
    errors: Float[Tensor, "*shape"], *, scale: float = 4.0, temperature: float = 0.07
) -> Float[Tensor, "*shape"]:
    """scale * exp(-E / temperature), in (0, scale], in float32 or better: float16 has no exp(-E / 0.07) for E of 1.2.

    It is 4.5e-5 of `scale` for E = 0.7: where errors are large all logits are equal, and so small timesteps of models
    that predict noise teach nothing.
    """
    precise = errors.to(torch.promote_types(errors.dtype, torch.float32))
    return scale * torch.exp(-precise / temperature)


def denoising_matrix(
    model_pred: Float[Tensor, "p*b channels height width"], target: Float[Tensor, "b channels height width"]
) -> Float[Tensor, "b p"]:
    """E[i, j]: squared error of image i under caption j, averaged over channels and positions, in float32 or better.

    Args:
        model_pred: what the denoiser said, all images under caption 0, then all under caption 1, ...
        target: of each image, whatever the caption: noise, velocity, or noise - image for flow models.
    """
    dtype = torch.promote_types(model_pred.dtype, torch.float32)
    said = model_pred.to(dtype).unflatten(0, (-1, len(target)))
    return (said - target.to(dtype)).square().flatten(2).mean(2).T
