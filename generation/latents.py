"""Latents to pixels with gradient, whatever the pipeline: its scaling, its packing, and the one way into [0, 1]."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from .pipelines import pipeline_family

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["decode_latents", "latent_scaling", "to_picture", "unit_pixels", "unpacked"]


def latent_scaling(
    vae: Any,
) -> tuple[Float[Tensor, ""], Float[Tensor, "1 channels 1 1"], Float[Tensor, "1 channels 1 1"]]:
    """Factor, mean and std of a VAE: latents are (z - mean) / std * factor.

    SD3 and FLUX have one mean for all channels, their shift.
    """
    config = vae.config
    mean = config.get("latents_mean") or [config.get("shift_factor") or 0.0]
    std = config.get("latents_std") or [1.0]
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std))
    return torch.tensor(config.scaling_factor), mean, std


def decode_latents(
    pipeline: DiffusionPipeline,
    latents: Float[Tensor, "n ..."],
    *,
    height: int,
    width: int,
) -> Float[Tensor, "n 3 height width"]:
    """What a pipeline's VAE makes of its latents, about [-1, 1], in float32, with gradient.

    Args:
        pipeline: of any family; its VAE is used in its own precision and on its own device.
        latents: as the pipeline returns them with `output_type="latent"` (FLUX packs them).
        height: of the image, in pixels.
        width: of the image, in pixels.
    """
    vae = pipeline.vae
    latents = unpacked(pipeline, latents, height=height, width=width)
    factor, mean, std = (values.to(latents.device, torch.float32) for values in latent_scaling(vae))
    scaled = (latents.float() / factor * std + mean).to(vae.device, vae.dtype)
    return vae.decode(scaled, return_dict=False)[0].float()


def unpacked(
    pipeline: DiffusionPipeline, latents: Float[Tensor, "n ..."], *, height: int, width: int
) -> Float[Tensor, "n channels h w"]:
    """A pipeline's latents as its VAE has them: FLUX puts four neighbours into one token."""
    if pipeline_family(pipeline) != "flux":
        return latents
    return pipeline._unpack_latents(latents, height, width, pipeline.vae_scale_factor)


def unit_pixels(decoded: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n 3 height width"]:
    """From the VAE's [-1, 1] to the [0, 1] that rewards see; the clamp stops the gradient of saturated pixels."""
    return (decoded / 2 + 0.5).clamp(0, 1)


def to_picture(pixels: Float[Tensor, "3 height width"]) -> Image.Image:
    """Pixels in [0, 1], on the CPU, rounded to 256 levels."""
    return Image.fromarray(pixels.mul(255).round().byte().permute(1, 2, 0).contiguous().numpy())
