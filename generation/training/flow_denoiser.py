"""A rectified-flow transformer as the objectives see it, with the noise that its training gives: SD 3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from .denoiser import Batch

__all__ = ["FlowDenoiser"]


class FlowDenoiser:
    """SD 3's transformer at integer timesteps: x_t = (1 - s) x_0 + s eps with s = t / T, and the target eps - x_0.

    Timesteps are taken as they come: the shift by which a sampler spends more steps on noise is not part of this.
    """

    def __init__(self, network: nn.Module, scheduler_config: Mapping[str, Any]) -> None:
        self.network = network
        self.num_train_timesteps: int = scheduler_config["num_train_timesteps"]

    def predict(self, batch: Batch) -> Float[Tensor, "n channels height width"]:
        """What the network says about the batch's noisy latents."""
        dtype = next(parameter.dtype for parameter in self.network.parameters() if parameter.is_floating_point())
        conditioning, noise = batch.conditioning, self._noise(batch.timesteps)
        assert conditioning.pooled_prompt_embeds is not None
        noisy = (1 - noise) * batch.latents + noise * batch.noise
        return self.network(
            hidden_states=noisy.to(dtype),
            timestep=batch.timesteps,
            encoder_hidden_states=conditioning.prompt_embeds.to(dtype),
            pooled_projections=conditioning.pooled_prompt_embeds.to(dtype),
            return_dict=False,
        )[0]

    def target(self, batch: Batch) -> Float[Tensor, "n channels height width"]:
        """eps - x_0, whatever the timestep."""
        return batch.noise - batch.latents

    def _noise(self, timesteps: Int[Tensor, " n"]) -> Float[Tensor, "n 1 1 1"]:
        return (timesteps.float() / self.num_train_timesteps)[:, None, None, None]
