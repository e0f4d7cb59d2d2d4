"""The denoising error, on which every other objective stands, and the plain loss made of it.

Denoising Diffusion Probabilistic Models, arXiv 2006.11239, eq. 14; min-SNR weights: arXiv 2303.09556.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["denoising_errors", "denoising_loss", "min_snr_weights", "pair_errors"]


def denoising_loss(
    model_pred: Float[Tensor, "n channels height width"],
    target: Float[Tensor, "n channels height width"],
    weights: Float[Tensor, " n"] | None = None,
) -> Float[Tensor, ""]:
    """Mean over images of the (weighted) denoising error: fine-tuning on the images as they are.

    Args:
        model_pred: what the denoiser said.
        target: noise for epsilon models, velocity for v models.
        weights: one factor per image, e.g. `min_snr_weights`.
    """
    errors = denoising_errors(model_pred, target)
    return (errors if weights is None else errors * weights).mean()


def denoising_errors(
    model_pred: Float[Tensor, "n channels height width"], target: Float[Tensor, "n channels height width"]
) -> Float[Tensor, " n"]:
    """m: squared error of each image, averaged over channels and positions, in float32 or better."""
    dtype = torch.promote_types(model_pred.dtype, torch.float32)
    return (model_pred.to(dtype) - target.to(dtype)).square().flatten(1).mean(1)


def pair_errors(
    model_pred: Float[Tensor, "2*b channels height width"], target: Float[Tensor, "2*b channels height width"]
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """m_w and m_l of stacked pairs, in float64 where the device has it."""
    errors = denoising_errors(model_pred, target)
    if errors.device.type != "mps":
        errors = errors.double()
    winners, losers = errors.chunk(2)
    return winners, losers


def min_snr_weights(snr: Float[Tensor, " n"], gamma: float, *, v_prediction: bool = False) -> Float[Tensor, " n"]:
    """min(SNR, gamma) / SNR, for v models / (SNR + 1): arXiv 2303.09556, section 3.4.

    Args:
        snr: signal-to-noise ratio abar_t / (1 - abar_t) of each image's timestep.
        gamma: 5 in the paper; above 0.
        v_prediction: the target is the velocity, not the noise.
    """
    return snr.clamp(max=gamma) / (snr + 1 if v_prediction else snr)
