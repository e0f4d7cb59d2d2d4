"""The noise levels that a scheduler samples at, in one form for all of them: x = scale * x_0 + noise * eps.

DDIM and its like keep scale^2 + noise^2 = 1, Euler's keep scale = 1, and rectified flow keeps scale + noise = 1. What
the network predicts (noise, velocity, flow, the image itself) is turned into an estimate of x_0 and of eps here, so
that one-step estimates, re-noising and Direct-Align are the same few lines for every pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.errors import InputError

__all__ = ["Level", "NoiseLevels", "ddim_like", "plain_scheduler", "precise", "refuse_edm"]


class Level(NamedTuple):
    """One noise level: x = scale * x_0 + noise * eps, at `time` in the units of the scheduler's timesteps."""

    scale: float
    noise: float
    time: float


@dataclass(frozen=True)
class NoiseLevels:
    """Levels of a sampling run, from noise to image.

    Attributes:
        levels: that of the start, and that after each step; one more than there are steps.
        prediction: what the network says: "epsilon", "v_prediction", "sample", or "flow" (eps - x_0).
    """

    levels: Sequence[Level]
    prediction: str

    @classmethod
    def of(cls, scheduler: Any) -> NoiseLevels:
        """The levels of a diffusers scheduler after its `set_timesteps`.

        Raises:
            InputError: a scheduler whose levels are not known here, or one of EDM's kind.
        """
        refuse_edm(scheduler.config)
        config, name = scheduler.config, type(scheduler).__name__
        times = [float(time) for time in scheduler.timesteps]
        if len(set(times)) != len(times):
            raise InputError(
                f"{name} goes to some timesteps twice, so its steps cannot be told apart; {plain_scheduler(scheduler)}"
            )
        prediction = config.get("prediction_type") or "epsilon"
        flow = _is_flow(scheduler)
        if flow or float(torch.as_tensor(scheduler.init_noise_sigma)) != 1.0:
            sigmas = [float(sigma) for sigma in scheduler.sigmas]
            if len(sigmas) != len(times) + 1:
                raise InputError(f"{name} also asks between its noise levels; {plain_scheduler(scheduler)}")
            levels = [Level(1 - s if flow else 1.0, s, t) for s, t in zip(sigmas, [*times, 0.0], strict=True)]
            return cls(levels, "flow" if flow else prediction)
        if not hasattr(scheduler, "alphas_cumprod"):
            raise InputError(f"the noise levels of {name} are not known; {plain_scheduler(scheduler)}")
        kept = [float(scheduler.alphas_cumprod[round(time)]) for time in times]
        kept.append(float(getattr(scheduler, "final_alpha_cumprod", 1.0)))
        return cls([Level(a**0.5, (1 - a) ** 0.5, t) for a, t in zip(kept, [*times, 0.0], strict=True)], prediction)

    def split(
        self, sample: Float[Tensor, "n ..."], prediction: Float[Tensor, "n ..."], level: Level
    ) -> tuple[Float[Tensor, "n ..."], Float[Tensor, "n ..."]]:
        """The one-step estimates of x_0 and of eps from what the (guided) network says at a level.

        In float32 at least: at the first levels of a run an error of the prediction is many times as large in x_0.
        """
        scale, noise, _ = level
        sample, prediction = precise(sample), precise(prediction)
        if self.prediction == "flow":
            return sample - noise * prediction, sample + scale * prediction
        if self.prediction == "epsilon":
            return (sample - noise * prediction) / scale, prediction
        if self.prediction == "v_prediction":  # of the sample brought to unit variance
            total = scale**2 + noise**2
            clean = (scale * sample - noise * total**0.5 * prediction) / total
        else:
            clean = prediction
        return clean, (sample - scale * clean) / noise

    @staticmethod
    def renoise(clean: Float[Tensor, "n ..."], eps: Float[Tensor, "n ..."], level: Level) -> Tensor:
        """x = scale * x_0 + noise * eps, in float32 at least."""
        return level.scale * precise(clean) + level.noise * precise(eps)

    def direct_align(
        self,
        sample: Float[Tensor, "n ..."],
        prediction: Float[Tensor, "n ..."],
        eps: Float[Tensor, "n ..."],
        here: Level,
        there: Level,
    ) -> Float[Tensor, "n ..."]:
        """The image that Direct-Align scores (arXiv 2509.06942; arXiv 2512.24146, algorithm 1).

        One ODE step from level `here` to `there`, then the noise that is known to be in `sample` is taken out:
        (x_there - noise_there * eps) / scale_there. The error of the network is thus scaled by the length of the step.

        Args:
            sample: x_0 re-noised to `here` with `eps`, as `renoise` returned it: what it loses in bfloat16 is as much
                multiplied as an error of the network.
            prediction: of the network, at `here`; the gradient goes through it alone.
            eps: the noise in `sample`.
            here: where the network was asked.
            there: less noise (the denoising branch) or more (the inversion branch), but not noise alone.
        """
        clean, noise = self.split(sample, prediction, here)
        return (there.scale * clean + there.noise * (noise - precise(eps))) / there.scale


def ddim_like(scheduler: Any, **settings: Any) -> Any:
    """A `DDIMScheduler` of the same noise schedule; latents of trained autoencoders are never clipped to [-1, 1].

    Only what a configuration states is taken over, and DDIM's own default clips.

    Raises:
        InputError: a scheduler of a rectified flow, or of EDM's kind, whose noise schedules DDIM does not have.
    """
    from diffusers import DDIMScheduler

    refuse_edm(scheduler.config)
    if _is_flow(scheduler):
        name = type(scheduler).__name__
        raise InputError(f'{name} is of a rectified flow, which DDIM is not; keep it (sampler "own" of a training run)')
    return DDIMScheduler.from_config(scheduler.config, clip_sample=False, set_alpha_to_one=False, **settings)


def plain_scheduler(scheduler: Any) -> str:
    """The end of an error: how to get a scheduler with one step a timestep in place of this one."""
    if _is_flow(scheduler):
        return "give the pipeline diffusers.FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config)"
    return (
        'set sampler "ddim" for a training run; in Python give the pipeline '
        "generation.noise_levels.ddim_like(pipeline.scheduler)"
    )


def _is_flow(scheduler: Any) -> bool:
    return type(scheduler).__name__.startswith("FlowMatch") or bool(scheduler.config.get("use_flow_sigmas"))


def refuse_edm(config: Mapping[str, Any]) -> None:
    """Raise InputError for the settings of a scheduler of EDM's kind.

    They say epsilon or v_prediction as well, in another scaling.
    """
    if "sigma_data" in config:
        raise InputError(
            "the model is one of EDM's kind (Playground 2.5, CosXL), whose noise and inputs are scaled otherwise; "
            "use SDXL, SD 1.5 or a fine-tune of those"
        )


def precise(tensor: Tensor) -> Tensor:
    """In float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
