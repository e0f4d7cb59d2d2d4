"""What is minimised, as pure functions on tensors: one file per method, each beside its paper.

All take predictions and targets `n channels height width` of a denoiser and return a named tuple whose `loss` is the
scalar to differentiate. Losses over pairs want the winners in the first half of the batch and the losers, in the same
order, in the second; both halves of a pair share noise and timestep. Errors per image are means in float32 or better;
what is computed from them per pair is in float64, because MaPO multiplies differences of errors by 500 and
Diffusion-DPO by 2,500.

Choosing: `mapo_loss` needs no reference and so one forward pass less; `diffusion_dpo_loss` keeps the model near the
reference; `reward_weighted_loss` takes scored single images; `denoising_loss` on winners is the plain baseline.
"""

from .denoising import denoising_errors, denoising_loss, min_snr_weights, pair_errors
from .diffusion_dpo import DiffusionDPOTerms, diffusion_dpo_loss
from .mapo import MaPOTerms, mapo_loss, mapo_score
from .reward_weighted import RewardWeightedTerms, reward_weighted_loss

__all__ = [
    "DiffusionDPOTerms",
    "MaPOTerms",
    "RewardWeightedTerms",
    "denoising_errors",
    "denoising_loss",
    "diffusion_dpo_loss",
    "mapo_loss",
    "mapo_score",
    "min_snr_weights",
    "pair_errors",
    "reward_weighted_loss",
]
