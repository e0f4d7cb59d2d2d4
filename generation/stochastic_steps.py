"""Sampling steps with a probability: x' = mean + std * noise, with the mean affine in the sample and the prediction.

What policy gradients need and no scheduler of diffusers returns. Four families, each a few lines beside its paper, and
all one form: mean = a * x + b * prediction. A flow's prediction is eps - x_0, its sigma is 1 at noise and 0 at the
image; D = sigma - sigma' > 0.
"""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.checks import in_range, one_of
from mmalign.errors import InputError

from .noise_levels import plain_scheduler, precise

__all__ = [
    "SamplerKind",
    "StochasticStep",
    "Transition",
    "constant_free_log_prob",
    "cps_step",
    "dance_sde_step",
    "ddim_step",
    "flow_sde_step",
    "gaussian_log_prob",
    "mean_per_sample",
    "stochastic_steps",
    "take_step",
]

SamplerKind = Literal["flow-sde", "dance-sde", "cps", "ddim"]


@dataclass(frozen=True, slots=True)
class StochasticStep:
    """One step of a sampler: x' is normal, its mean is `sample` * x + `output` * (what the network says).

    Attributes:
        sample: factor of the latents before the step.
        output: factor of the network's output, after guidance.
        std: standard deviation of the step, 0 for a deterministic one, which has no density.
        weight: GRPO-Guard's of this step (arXiv 2510.22319): 1/D for flow-sde, else 1/|output|; 0 where the output
            does not count.
        kl_std: the deviation that the released KL term divides by: for flow-sde that of the step without sqrt(D), else
            `std`.
    """

    sample: float
    output: float
    std: float
    weight: float
    kl_std: float

    def mean(self, x: Float[Tensor, "n ..."], output: Float[Tensor, "n ..."]) -> Float[Tensor, "n ..."]:
        """The mean of x', in float32 at least: bfloat16 loses the ratio of two policies."""
        return self.sample * precise(x) + self.output * precise(output)


class Transition(NamedTuple):
    """A step taken: `sample` = mean + std * noise."""

    mean: Float[Tensor, "n ..."]
    std: float
    sample: Float[Tensor, "n ..."]


def take_step(
    step: StochasticStep, x: Float[Tensor, "n ..."], output: Float[Tensor, "n ..."], noise: Float[Tensor, "n ..."]
) -> Transition:
    """x' and its mean, in float32 at least; `noise` is standard normal, and of no account where `std` is 0."""
    mean = step.mean(x, output)
    return Transition(mean, step.std, mean + step.std * precise(noise) if step.std else mean)


def stochastic_steps(
    scheduler: Any, kind: SamplerKind, *, level: float, window: Container[int] | None = None
) -> list[StochasticStep]:
    """A step for every one of a diffusers scheduler, after its `set_timesteps`.

    Args:
        scheduler: `FlowMatchEulerDiscreteScheduler` for "flow-sde", "dance-sde" and "cps", `DDIMScheduler` for "ddim".
        kind: see `flow_sde_step`, `dance_sde_step`, `cps_step` and `ddim_step`.
        level: how much noise. 0.7 for flow-sde, 0.3 for dance-sde, 0.8 for cps and 1 for ddim are published; 0 is the
            scheduler's own deterministic step.
        window: numbers of the steps that are stochastic, from 0 at noise; the others are deterministic (Flow-GRPO-Fast,
            MixGRPO). All where `None`.

    Raises:
        InputError: another kind, a scheduler that does not go with it or has no timesteps yet, or a level outside of
            [0, 1] for cps and ddim or below 0.
    """
    one_of("sampler", kind, get_args(SamplerKind))
    in_range("noise level", level, 0, 1 if kind in ("cps", "ddim") else math.inf)
    levels = [level if window is None or number in window else 0.0 for number in range(len(scheduler.timesteps))]
    if kind == "ddim":
        prediction, pairs = _ddim_levels(scheduler)
        return [ddim_step(*pair, level=level, prediction=prediction) for pair, level in zip(pairs, levels, strict=True)]
    sigmas = _flow_levels(scheduler, kind)
    steps = []
    for number, level in enumerate(levels):
        sigma, following = sigmas[number : number + 2]
        if kind == "flow-sde":
            steps.append(flow_sde_step(sigma, following, level=level, second_sigma=sigmas[1]))
        else:
            steps.append((dance_sde_step if kind == "dance-sde" else cps_step)(sigma, following, level=level))
    return steps


def flow_sde_step(sigma: float, next_sigma: float, *, level: float, second_sigma: float) -> StochasticStep:
    """The SDE of Flow-GRPO (arXiv 2505.05470), sigma_t = level * sqrt(sigma / (1 - sigma)).

    At sigma = 1 the square root takes the second sigma of the run, `second_sigma`, as the released code does.
    """
    length = sigma - next_sigma
    sigma_t = level * math.sqrt(sigma / (1 - (second_sigma if sigma == 1 else sigma)))
    drift = sigma_t**2 / (2 * sigma)
    return StochasticStep(
        sample=1 - drift * length,
        output=-(1 + drift * (1 - sigma)) * length,
        std=sigma_t * math.sqrt(length),
        weight=1 / length,
        kl_std=sigma_t,
    )


def dance_sde_step(sigma: float, next_sigma: float, *, level: float) -> StochasticStep:
    """The SDE of DanceGRPO (arXiv 2505.07818): noise of the same strength `level` (eta) at every sigma."""
    length = sigma - next_sigma
    drift = level**2 / (2 * sigma)  # of the score, -(x + (1 - sigma) v) / sigma
    std = level * math.sqrt(length)
    return _step(1 - drift * length, -(1 + drift * (1 - sigma)) * length, std)


def cps_step(sigma: float, next_sigma: float, *, level: float) -> StochasticStep:
    """Coefficients-Preserving Sampling (arXiv 2509.05952): a part of the estimated noise is drawn anew.

    x' = (1 - sigma') x_0 + sigma' (cos(level pi/2) eps + sin(level pi/2) z), for a level in [0, 1]; 1 is diffusers'
    `stochastic_sampling`. The noise of a step does not shrink with its length, so images vary less than the
    deterministic sampler's however many the steps: by a fifth at level 0.8 where the exact denoiser is known.
    """
    angle = level * math.pi / 2
    clean, noise = 1 - next_sigma, next_sigma * math.cos(angle)
    return _step(clean + noise, noise * (1 - sigma) - clean * sigma, next_sigma * math.sin(angle))


def ddim_step(
    alpha: float, next_alpha: float, *, level: float, prediction: Literal["epsilon", "v_prediction"]
) -> StochasticStep:
    """DDIM (arXiv 2010.02502, eq. 12 and 16) from cumulative alpha to `next_alpha`, with eta = `level` in [0, 1].

    The policy of DDPO (arXiv 2305.13301).
    """
    std = level * math.sqrt((1 - next_alpha) / (1 - alpha) * (1 - alpha / next_alpha))
    clean, noise = math.sqrt(next_alpha), math.sqrt(max(1 - next_alpha - std**2, 0.0))  # below 0 by rounding alone
    if prediction == "epsilon":
        return _step(clean / math.sqrt(alpha), noise - clean * math.sqrt((1 - alpha) / alpha), std)
    kept, lost = math.sqrt(alpha), math.sqrt(1 - alpha)
    return _step(clean * kept + noise * lost, noise * kept - clean * lost, std)


def gaussian_log_prob(
    sample: Float[Tensor, "n ..."], mean: Float[Tensor, "n ..."], std: float | Float[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """The log-density of `sample`, averaged (not summed) over all but the first axis, as in DDPO and Flow-GRPO.

    No gradient goes to `sample`. In float64 where the device has it: a ratio of two policies is clipped at 1 +- 2e-6,
    which the rounding of a float32 log-density of 1 nearly reaches; keep what is stored of it in that precision.

    Args:
        sample: x', in the precision in which it is stored.
        mean: of the step.
        std: of the step, above 0; one for all, or one a sample.
    """
    error = -constant_free_log_prob(sample, mean)
    deviation = torch.as_tensor(std, dtype=error.dtype, device=error.device)
    return -error / (2 * deviation.square()) - deviation.log() - math.log(2 * math.pi) / 2


def constant_free_log_prob(sample: Float[Tensor, "n ..."], mean: Float[Tensor, "n ..."]) -> Float[Tensor, " n"]:
    """CPS's (arXiv 2509.05952), -mean((x' - mean)^2): without constants and, on purpose, without 1 / (2 std^2).

    No gradient goes to `sample`; precision as `gaussian_log_prob`. GRPO-Guard's ratio needs `gaussian_log_prob`.
    """
    return -mean_per_sample((precise(sample.detach()) - precise(mean)).square())


def mean_per_sample(values: Float[Tensor, "n ..."]) -> Float[Tensor, " n"]:
    """The mean over all but the first axis, summed up in float64 where the device has it."""
    values = values.flatten(1)
    return values.mean(1, dtype=values.dtype if values.device.type == "mps" else torch.float64)


# -- what schedulers say -------------------------------------------------------------------------------------------


def _flow_levels(scheduler: Any, kind: str) -> list[float]:
    from diffusers import FlowMatchEulerDiscreteScheduler

    name = type(scheduler).__name__
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        flow = name.startswith("FlowMatch")
        raise InputError(
            f"{name} does not go with sampler {kind!r}, which wants FlowMatchEulerDiscreteScheduler; "
            + (plain_scheduler(scheduler) if flow else 'set sampler "ddim" for models of a noise schedule')
        )
    sigmas = [float(sigma) for sigma in scheduler.sigmas]
    if len(sigmas) != len(scheduler.timesteps) + 1:
        raise InputError(f"{name} has no timesteps yet; call its set_timesteps first")
    if any(following >= sigma for sigma, following in pairwise(sigmas)):
        raise InputError(f"{name} has sigmas that do not fall; give it others, and leave invert_sigmas off")
    return sigmas


def _ddim_levels(scheduler: Any) -> tuple[Literal["epsilon", "v_prediction"], Sequence[tuple[float, float]]]:
    """What the network says, and the cumulative alphas before and after each step, as `DDIMScheduler.step` has them."""
    from diffusers import DDIMScheduler

    name = type(scheduler).__name__
    if not isinstance(scheduler, DDIMScheduler):
        flow = name.startswith("FlowMatch")
        raise InputError(
            f"{name} does not go with sampler 'ddim', which wants DDIMScheduler; "
            + ('set sampler "flow-sde" for a flow' if flow else plain_scheduler(scheduler))
        )
    config = scheduler.config
    prediction = config.prediction_type
    if prediction not in ("epsilon", "v_prediction"):
        raise InputError(f"{name} is of prediction_type {prediction!r}; take a model of epsilon or v_prediction")
    for setting in ("clip_sample", "thresholding"):
        if config[setting]:
            raise InputError(f"{name} has {setting} on, which has no density; set {setting}=False in its from_config")
    if scheduler.num_inference_steps is None:
        raise InputError(f"{name} has no timesteps yet; call its set_timesteps first")
    length = config.num_train_timesteps // scheduler.num_inference_steps
    alphas, last = scheduler.alphas_cumprod.tolist(), float(scheduler.final_alpha_cumprod)
    times = [int(time) for time in scheduler.timesteps]
    pairs = [(alphas[time], alphas[time - length] if time >= length else last) for time in times]
    if prediction == "epsilon" and not all(alpha for alpha, _ in pairs):
        raise InputError(
            f"{name} starts from noise alone (rescale_betas_zero_snr), which epsilon cannot be subtracted from; "
            "set rescale_betas_zero_snr=False in its from_config, or take a model of v_prediction"
        )
    return prediction, pairs


def _step(sample: float, output: float, std: float) -> StochasticStep:
    return StochasticStep(sample, output, std, 1 / abs(output) if output else 0.0, std)
