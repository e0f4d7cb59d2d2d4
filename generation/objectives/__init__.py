"""What is minimised, as pure functions on tensors: one file per method, each beside its paper.

All take predictions and targets `n channels height width` of a denoiser and return a named tuple whose `loss` is the
scalar to differentiate. Losses over pairs want the winners in the first half of the batch and the losers, in the same
order, in the second; both halves of a pair share noise and timestep. Errors per image are means in float32 or better;
what is computed from them per pair is in float64, because MaPO multiplies differences of errors by 500 and
Diffusion-DPO by 2,500.

Choosing: `mapo_loss` needs no reference and so one forward pass less; `diffusion_dpo_loss` keeps the model near the
reference; `reward_weighted_loss` takes scored single images; `denoising_loss` on winners is the plain baseline.

Policy gradients need no pairs and no gradient of a reward: `group_advantages` (or `median_advantages`) of rewards, a
ratio of densities (`guarded_ratio_from_noise`, `guarded_ratio` or `plain_ratio`), and `policy_loss` or
`kl_masked_loss`, which give a loss per sample.

Captioned images alone, and soft tokens instead of weights: `softrepa_loss` over a matrix of errors.
"""

from .denoising import denoising_errors, denoising_loss, min_snr_weights, pair_errors
from .diffusion_dpo import DiffusionDPOTerms, diffusion_dpo_loss
from .group_advantages import group_advantages, median_advantages
from .mapo import MaPOTerms, mapo_loss, mapo_score
from .policy_gradient import (
    PolicyTerms,
    gaussian_divergence,
    guarded_ratio,
    guarded_ratio_from_noise,
    kl_masked_loss,
    plain_ratio,
    policy_loss,
    scaled_clip_range,
    step_weights,
)
from .reward_weighted import RewardWeightedTerms, reward_weighted_loss
from .softrepa import SoftREPATerms, denoising_logits, denoising_matrix, softrepa_loss

__all__ = [
    "DiffusionDPOTerms",
    "MaPOTerms",
    "PolicyTerms",
    "RewardWeightedTerms",
    "SoftREPATerms",
    "denoising_errors",
    "denoising_logits",
    "denoising_loss",
    "denoising_matrix",
    "diffusion_dpo_loss",
    "gaussian_divergence",
    "group_advantages",
    "guarded_ratio",
    "guarded_ratio_from_noise",
    "kl_masked_loss",
    "mapo_loss",
    "mapo_score",
    "median_advantages",
    "min_snr_weights",
    "pair_errors",
    "plain_ratio",
    "policy_loss",
    "reward_weighted_loss",
    "scaled_clip_range",
    "softrepa_loss",
    "step_weights",
]
