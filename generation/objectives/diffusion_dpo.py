"""Diffusion-DPO: direct preference optimisation against a frozen reference, arXiv 2311.12908, eq. 14."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from .denoising import pair_errors

__all__ = ["DiffusionDPOTerms", "diffusion_dpo_loss"]


class DiffusionDPOTerms(NamedTuple):
    """`loss` = - mean log sigmoid(z); everything else has one value a pair."""

    loss: Float[Tensor, ""]
    mse_w: Float[Tensor, " b"]
    mse_l: Float[Tensor, " b"]
    ref_mse_w: Float[Tensor, " b"]
    ref_mse_l: Float[Tensor, " b"]
    z: Float[Tensor, " b"]

    def ranked_right(self, ties: float = 0.5) -> Float[Tensor, " b"]:
        """1 where z > 0, else 0; `ties` where z = 0 (0 in the paper's code, 0.5 in the diffusers example).

        At the first step of a LoRA run every z is 0 and the loss is log 2.
        """
        return (self.z > 0).to(self.z.dtype) + ties * (self.z == 0)


def diffusion_dpo_loss(
    model_pred: Float[Tensor, "2*b channels height width"],
    ref_pred: Float[Tensor, "2*b channels height width"],
    target: Float[Tensor, "2*b channels height width"],
    *,
    beta: float = 5000.0,
) -> DiffusionDPOTerms:
    """Lower the winner's error, relative to the loser's, more than the reference does.

        z = -beta/2 ((m_w - m_l) - (mref_w - mref_l)),   L = - mean log sigmoid(z)

    The derivation's timestep weight is constant, as in the released code.

    Args:
        model_pred: the trained model's prediction: winners, then losers in the same order.
        ref_pred: the frozen reference's, for the same noisy latents, timesteps and conditions.
        target: noise (epsilon models) or velocity, stacked alike.
        beta: strength of the pull to the reference, above 0; 5000 for SDXL, 2000 to 5000 for SD 1.5.
    """
    mse_w, mse_l = pair_errors(model_pred, target)
    ref_mse_w, ref_mse_l = pair_errors(ref_pred.detach(), target)
    z = -beta / 2 * ((mse_w - mse_l) - (ref_mse_w - ref_mse_l))
    return DiffusionDPOTerms(-logsigmoid(z).mean(), mse_w, mse_l, ref_mse_w, ref_mse_l, z)
