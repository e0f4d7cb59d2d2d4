"""Reward-weighted likelihood, arXiv 2302.12192, eq. 4 in diffusion form. No official code exists."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from .denoising import denoising_errors

__all__ = ["RewardWeightedTerms", "reward_weighted_loss"]


class RewardWeightedTerms(NamedTuple):
    """`loss` = mean(reward * mse) + beta * mean(mse_pretrain)."""

    loss: Float[Tensor, ""]
    mse: Float[Tensor, " n"]
    mse_pretrain: Float[Tensor, " m"] | None


def reward_weighted_loss(
    model_pred: Float[Tensor, "n channels height width"],
    target: Float[Tensor, "n channels height width"],
    reward: Float[Tensor, " n"],
    model_pred_pretrain: Float[Tensor, "m channels height width"] | None = None,
    target_pretrain: Float[Tensor, "m channels height width"] | None = None,
    *,
    beta: float = 1.0,
) -> RewardWeightedTerms:
    """Denoising of scored images, each weighted by its reward, plus `beta` times denoising of pre-training images.

    Images are not paired: noise and timestep are independent. Rewards are not normalised.

    Args:
        model_pred: prediction on generated images that people or a model scored.
        target: noise or velocity, alike.
        reward: one a scored image, in [0, 1].
        model_pred_pretrain: prediction on images of the pre-training distribution; they keep fidelity up.
        target_pretrain: noise or velocity of those.
        beta: weight of the second term; 0 or no pre-training images leave it out.
    """
    mse = denoising_errors(model_pred, target)
    loss = (reward.to(mse.dtype) * mse).mean()
    if model_pred_pretrain is None or target_pretrain is None:
        return RewardWeightedTerms(loss, mse, None)
    mse_pretrain = denoising_errors(model_pred_pretrain, target_pretrain)
    return RewardWeightedTerms(loss + beta * mse_pretrain.mean(), mse, mse_pretrain)
