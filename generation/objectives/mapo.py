"""MaPO: margin-aware preference optimisation without a reference model, arXiv 2406.06424.

The form is that of the released code (mapo-t2i/mapo, commit 374b3d3), written so that it stays finite.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from .denoising import pair_errors

__all__ = ["MaPOTerms", "mapo_loss", "mapo_score"]


class MaPOTerms(NamedTuple):
    """`loss` = mean(weight * mse_w) - mean(ratio_losses); everything else has one value a pair."""

    loss: Float[Tensor, ""]
    mse_w: Float[Tensor, " b"]
    mse_l: Float[Tensor, " b"]
    score_w: Float[Tensor, " b"]
    score_l: Float[Tensor, " b"]
    z: Float[Tensor, " b"]
    ratio_losses: Float[Tensor, " b"]


def mapo_loss(
    model_pred: Float[Tensor, "2*b channels height width"],
    target: Float[Tensor, "2*b channels height width"],
    *,
    beta: float = 0.1,
    snr_value: float = 0.5,
    num_train_timesteps: int = 1000,
    denoising_weights: Float[Tensor, " b"] | None = None,
) -> MaPOTerms:
    """Denoising loss of the winners minus a bounded margin between winner and loser.

        f(x) = x / (exp(x) - 1),   z = T (f(s m_w) - f(s m_l)),   L = mean m_w - beta mean log sigmoid(z)

    For small errors z is about T s / 2 * (m_l - m_w), i.e. 250 times the difference at the defaults: the margin term
    acts like a reference-free DPO with beta 500, weighted by `beta`. Many real pairs are saturated (|z| of 2.5 to 25).

    Args:
        model_pred: winners, then losers in the same order.
        target: noise (epsilon models) or velocity, stacked alike.
        beta: weight of the margin term, at least 0.
        snr_value: s, one constant above 0; not a function of the timestep.
        num_train_timesteps: T of the noise schedule.
        denoising_weights: factors of the first term only, e.g. `min_snr_weights`; the paper has none.
    """
    mse_w, mse_l = pair_errors(model_pred, target)
    score_w, score_l = mapo_score(snr_value * mse_w), mapo_score(snr_value * mse_l)
    z = num_train_timesteps * (score_w - score_l)
    ratio_losses = beta * logsigmoid(z)
    denoising = mse_w if denoising_weights is None else mse_w * denoising_weights
    return MaPOTerms(denoising.mean() - ratio_losses.mean(), mse_w, mse_l, score_w, score_l, z, ratio_losses)


def mapo_score(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """f(x) = x / (exp(x) - 1) for x >= 0, in (0, 1], f(0) = 1, f'(0) = -1/2; finite with its gradient everywhere.

    The expression as printed is 0/0 at 0 and overflows for large x, and its derivative cancels for small x. So: its
    Taylor series (Bernoulli numbers) below 0.1, where the first term left out is 2e-18, and `expm1(-x)` above.
    """
    small = x < 0.1
    # `where` guards the inputs, not only the outputs: a NaN that is not chosen would still reach the gradient.
    near = torch.where(small, x, 0.0)
    far = torch.where(small, 1.0, x)
    square = near * near
    series = 1 - near / 2 + square * (1 / 12 - square * (1 / 720 - square * (1 / 30240 - square / 1209600)))
    return torch.where(small, series, far * torch.exp(-far) / -torch.expm1(-far))
