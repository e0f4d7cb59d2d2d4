"""The trained network as the objectives see it: noise goes in by the model's own schedule, a prediction comes out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmalign.errors import InputError

from ..noise_levels import refuse_edm
from ..objectives import min_snr_weights

__all__ = ["Batch", "Conditioning", "Denoiser"]


@dataclass(frozen=True)
class Conditioning:
    """What the denoiser is told beside the timestep: embeddings of the caption, and for SDXL pooled ones and sizes."""

    prompt_embeds: Float[Tensor, "n tokens dim"]
    pooled_prompt_embeds: Float[Tensor, "n pooled"] | None = None
    time_ids: Float[Tensor, "n 6"] | None = None

    def repeat(self, times: int) -> Conditioning:
        """The whole batch, `times` times one after the other (not interleaved)."""
        return self._with(lambda tensor: tensor.repeat(times, *[1] * (tensor.ndim - 1)))

    def to(self, device: torch.device) -> Conditioning:
        """On a device."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def _with(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        pooled, time_ids = self.pooled_prompt_embeds, self.time_ids
        return Conditioning(
            change(self.prompt_embeds),
            None if pooled is None else change(pooled),
            None if time_ids is None else change(time_ids),
        )


@dataclass(frozen=True)
class Batch:
    """Inputs of one forward pass. For pairs: all winners, then all losers; both halves share noise and timesteps."""

    names: list[str]
    latents: Float[Tensor, "n channels height width"]
    noise: Float[Tensor, "n channels height width"]
    timesteps: Int[Tensor, " n"]
    conditioning: Conditioning
    rewards: Float[Tensor, " n"] | None = None

    def to(self, device: torch.device) -> Batch:
        """All of it on a device."""
        return replace(
            self,
            latents=self.latents.to(device, non_blocking=True),
            noise=self.noise.to(device, non_blocking=True),
            timesteps=self.timesteps.to(device),
            conditioning=self.conditioning.to(device),
            rewards=None if self.rewards is None else self.rewards.to(device),
        )

    def labels(self) -> dict[str, list[str]]:
        """What an error calls each row."""
        return {"": [f"{n} (timestep {int(t)})" for n, t in zip(self.names, self.timesteps, strict=False)]}


class Denoiser:
    """A UNet of SDXL or SD 1.5 with its training schedule (DDPM, from the pipeline's own scheduler settings)."""

    def __init__(self, network: nn.Module, scheduler_config: Mapping[str, Any]) -> None:
        """Raises InputError for a model that predicts neither noise nor velocity, or is scaled as in EDM."""
        from diffusers import DDPMScheduler

        refuse_edm(scheduler_config)
        self.network = network
        self.schedule = DDPMScheduler.from_config(scheduler_config)
        self.prediction_type: str = self.schedule.config.prediction_type
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise InputError(
                f"the model predicts {self.prediction_type!r}; training needs one that predicts epsilon or v_prediction"
            )
        self.num_train_timesteps: int = self.schedule.config.num_train_timesteps

    def predict(self, batch: Batch, network: nn.Module | None = None) -> Float[Tensor, "n channels height width"]:
        """What the network (or another one, such as a reference) says about the batch's noisy latents."""
        network = network or self.network
        dtype = next(parameter.dtype for parameter in network.parameters() if parameter.is_floating_point())
        conditioning = batch.conditioning
        added = None
        if conditioning.pooled_prompt_embeds is not None:
            # Sizes stay float32: bfloat16 has no 1023.
            added = {"text_embeds": conditioning.pooled_prompt_embeds.to(dtype), "time_ids": conditioning.time_ids}
        noisy = self.schedule.add_noise(batch.latents, batch.noise, batch.timesteps)
        return network(
            noisy.to(dtype),
            batch.timesteps,
            encoder_hidden_states=conditioning.prompt_embeds.to(dtype),
            added_cond_kwargs=added,
            return_dict=False,
        )[0]

    def target(self, batch: Batch) -> Float[Tensor, "n channels height width"]:
        """Noise for epsilon models; sqrt(abar) noise - sqrt(1 - abar) latents for v models."""
        if self.prediction_type == "epsilon":
            return batch.noise
        return self.schedule.get_velocity(batch.latents, batch.noise, batch.timesteps)

    def snr(self, timesteps: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """abar_t / (1 - abar_t)."""
        kept = self.schedule.alphas_cumprod.to(timesteps.device)[timesteps]
        return kept / (1 - kept)

    def min_snr_weights(self, timesteps: Int[Tensor, " n"], gamma: float) -> Float[Tensor, " n"]:
        """Factors of the denoising errors at these timesteps (arXiv 2303.09556), for what this model predicts."""
        return min_snr_weights(self.snr(timesteps), gamma, v_prediction=self.prediction_type == "v_prediction")
