"""Clipped policy gradients for samplers with a density (`generation.stochastic_steps`), one denoising step at a time.

A ratio compares the network with itself at the rollout; the loss pushes it up where the advantage is positive, and no
further than the clip range. `plain_ratio` is Flow-GRPO's; `guarded_ratio` is GRPO-Guard's, which takes out what makes
the plain one smaller than 1 on average and differently wide at each step, and goes with the step weights "guard".

Log-densities are means over the latents, not sums, so that clip ranges are tiny (1e-5 to 2e-6) and depend on the size
of the latents: `scaled_clip_range`. What is computed per sample is in float64 where the device has it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmalign.checks import one_of
from mmalign.errors import InputError

from ..noise_levels import precise
from ..stochastic_steps import StochasticStep, mean_per_sample

__all__ = [
    "PolicyTerms",
    "StepWeight",
    "gaussian_divergence",
    "guarded_ratio",
    "guarded_ratio_from_noise",
    "kl_masked_loss",
    "plain_ratio",
    "policy_loss",
    "scaled_clip_range",
    "step_weights",
]

StepWeight = Literal["none", "guard", "std"]


class PolicyTerms(NamedTuple):
    """Per sample: what is minimised, and whether the trust region stopped it above or below a ratio of 1.

    Where it stopped it there is no gradient. Healthy runs stop samples on both sides: log both shares.
    """

    losses: Float[Tensor, " n"]
    clipped_high: Bool[Tensor, " n"]
    clipped_low: Bool[Tensor, " n"]


def plain_ratio(log_prob: Float[Tensor, " n"], old_log_prob: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """exp(log_prob - old_log_prob), of DDPO (arXiv 2305.13301), Flow-GRPO (arXiv 2505.05470) and DanceGRPO.

    No gradient goes to `old_log_prob`.
    """
    return (log_prob - old_log_prob.detach()).exp()


def guarded_ratio(
    mean: Float[Tensor, "n ..."],
    old_mean: Float[Tensor, "n ..."],
    std: float | Float[Tensor, " n"],
    *,
    log_prob: Float[Tensor, " n"],
    old_log_prob: Float[Tensor, " n"],
) -> Float[Tensor, " n"]:
    """GRPO-Guard's RatioNorm (arXiv 2510.22319): exp(std * (log_prob - old_log_prob + divergence of the means)).

    Equal to `guarded_ratio_from_noise`, which is exacter and needs no densities. The gradient goes through the
    divergence too, and none to what is old. The released script averages the divergence over the whole batch, which
    its author confirmed to be an error (issue 244 of yifan123/flow_grpo); here each sample has its own.

    Args:
        mean: of the step, under the network.
        old_mean: under the network at the rollout.
        std: of the step; one for all, or one a sample.
        log_prob: `gaussian_log_prob` of the sample under `mean`; not CPS's without constants.
        old_log_prob: under `old_mean`.
    """
    drift = gaussian_divergence(mean, old_mean, std)
    deviation = torch.as_tensor(std, dtype=drift.dtype, device=drift.device)
    return (deviation * (log_prob - old_log_prob.detach() + drift)).exp()


def guarded_ratio_from_noise(
    mean: Float[Tensor, "n ..."], old_mean: Float[Tensor, "n ..."], noise: Float[Tensor, "n ..."]
) -> Float[Tensor, " n"]:
    """`guarded_ratio` as it is when x' = old_mean + std * noise: exp(mean((mean - old_mean) * noise)).

    No difference of large numbers, so the best in low precision. No gradient goes to `old_mean` and `noise`.
    """
    return mean_per_sample((precise(mean) - precise(old_mean.detach())) * precise(noise.detach())).exp()


def gaussian_divergence(
    mean: Float[Tensor, "n ..."], reference_mean: Float[Tensor, "n ..."], std: float | Float[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """KL divergence of two normal steps of equal deviation, averaged over the latents: mean(difference^2) / (2 std^2).

    No gradient goes to `reference_mean`. The released KL term of Flow-GRPO takes `StochasticStep.kl_std` for `std`.
    """
    squares = mean_per_sample((precise(mean) - precise(reference_mean.detach())).square())
    return squares / (2 * torch.as_tensor(std, dtype=squares.dtype, device=squares.device).square())


def policy_loss(
    ratio: Float[Tensor, " n"],
    advantages: Float[Tensor, " n"],
    *,
    clip: float | tuple[float, float],
    weight: float | Float[Tensor, " n"] = 1.0,
) -> PolicyTerms:
    """weight * max(-A ratio, -A clip(ratio, 1 - low, 1 + high)): PPO's, arXiv 1707.06347, eq. 7.

    Args:
        ratio: of the sample's density under the network and at the rollout.
        advantages: already clamped.
        clip: low and high alike, or a pair of them.
        weight: of the step, see `step_weights`.
    """
    low, high = clip if isinstance(clip, tuple) else (clip, clip)
    advantages = advantages.to(ratio)
    losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high))
    return PolicyTerms(weight * losses, (advantages > 0) & (ratio > 1 + high), (advantages < 0) & (ratio < 1 - low))


def kl_masked_loss(
    ratio: Float[Tensor, " n"],
    advantages: Float[Tensor, " n"],
    divergence: Float[Tensor, " n"],
    *,
    threshold: float = 1e-5,
    weight: float | Float[Tensor, " n"] = 1.0,
) -> Float[Tensor, " n"]:
    """Flow-DPPO's trust region (arXiv 2606.11025) in place of the clip: weight * -A ratio, or 0 outside of it.

    Outside are samples that the network has left by `threshold` or more and that would lead it further still.

    Args:
        ratio: of the sample's density under the network and at the rollout.
        advantages: already clamped.
        divergence: `gaussian_divergence` of the network from itself at the rollout.
        threshold: 1e-5 in the paper, for means over latents.
        weight: of the step, see `step_weights`.
    """
    advantages = advantages.to(ratio)
    further = ((advantages > 0) & (ratio > 1)) | ((advantages < 0) & (ratio < 1))
    dropped = further & (divergence >= threshold)
    return weight * torch.where(dropped, torch.zeros_like(ratio), -advantages * ratio)


def scaled_clip_range(clip: float, dims: int, *, at: int = 65536) -> float:
    """A clip range that was found with latents of `at` numbers (16 * 64 * 64: SD3 at 512 px), for latents of `dims`.

    The spread of a log-ratio, a mean over the latents, falls with the square root of their number.
    """
    return clip * math.sqrt(at / dims)


def step_weights(steps: Sequence[StochasticStep], kind: StepWeight, *, normalize: bool) -> list[float]:
    """The factor of the loss at each of the trained steps.

    Args:
        steps: those that are trained.
        kind: "none", 1 each; "guard", `StochasticStep.weight`, which with `guarded_ratio` makes the gradient of the
            network's output alike at all steps (GRPO-Guard, arXiv 2510.22319); "std", the steps' deviations, which
            with `plain_ratio` favours steps of much noise (TempFlow-GRPO, arXiv 2508.04324).
        normalize: bring their mean to 1, so that the learning rate, the gradient's limit and a KL term mean what they
            mean without weights. The released code does not: GRPO-Guard's weights are 4 to 25 at ten steps.

    Raises:
        InputError: another kind, or weights that are all 0.
    """
    one_of("step weight", kind, get_args(StepWeight))
    weights = [{"none": 1.0, "guard": step.weight, "std": step.std}[kind] for step in steps]
    if not normalize:
        return weights
    if not any(weights):
        raise InputError(f"step weights {kind!r} are all 0; give stochastic steps, that is, a noise level above 0")
    mean = math.fsum(weights) / len(weights)
    return [weight / mean for weight in weights]
