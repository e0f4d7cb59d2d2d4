"""The frozen encoders around a denoiser: images to latents, captions to embeddings, each one by one.

One by one, because a batch changes the last bits of what convolutions and attention return: so a latent is a function
of its image alone, and training from the cache equals training without. At 1024 px a GPU is full with one image.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.fingerprint import token_probe, weights_digest

from ..latents import latent_scaling
from ..pipelines import quiet_diffusers

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["LatentEncoder", "PromptEncoder"]


class LatentEncoder:
    """A pipeline's VAE: pixels in [-1, 1] to scaled latents, and back."""

    def __init__(self, vae: Any, device: torch.device) -> None:
        self._vae, self._device = vae, device
        self.fingerprint = _digest(
            weights_digest(vae), [values.tolist() for values in latent_scaling(vae)], _settings(vae)
        )

    @torch.no_grad()
    def encode(self, pixels: Float[Tensor, "3 height width"], key: str) -> Float[Tensor, "channels h w"]:
        """A sample of the posterior, times the scaling factor; its noise is a function of `key`."""
        vae = self._vae.to(self._device)
        posterior = vae.encode(pixels[None].to(vae.device, vae.dtype)).latent_dist
        # Drawn on the CPU, so that the same image has the same latent on every device.
        generator = torch.Generator().manual_seed(int(key[:15], 16))
        noise = torch.randn(posterior.mean.shape, generator=generator).to(posterior.mean)
        factor, mean, std = latent_scaling(vae)
        return (((posterior.mean + posterior.std * noise).float().cpu() - mean) / std * factor)[0]

    @torch.no_grad()
    def decode(self, latent: Float[Tensor, "channels h w"]) -> Float[Tensor, "3 height width"]:
        """Pixels, about [-1, 1], on the CPU. In tiles of 512 px: a whole 1024 px image takes several GB."""
        vae = self._vae.to(self._device)
        factor, mean, std = latent_scaling(vae)
        latent = latent.float().cpu()[None] / factor * std + mean
        sizes = vae.tile_sample_min_size, vae.tile_latent_min_size
        vae.enable_tiling()
        vae.tile_sample_min_size, vae.tile_latent_min_size = 512, 64
        try:
            return vae.decode(latent.to(vae.device, vae.dtype)).sample[0].float().cpu()
        finally:
            vae.disable_tiling()
            vae.tile_sample_min_size, vae.tile_latent_min_size = sizes

    def release(self) -> None:
        """Leave the accelerator."""
        self._vae.to("cpu")
        _empty_cache()


class PromptEncoder:
    """A pipeline's text encoders and tokenizers, through the pipeline's own `encode_prompt`."""

    def __init__(self, pipeline: DiffusionPipeline, device: torch.device) -> None:
        self._pipeline, self._device = pipeline, device
        names = sorted(name for name in pipeline.components if name.startswith(("text_encoder", "tokenizer")))
        self._encoders = [pipeline.components[n] for n in names if n.startswith("text_encoder")]
        tokenizers = [pipeline.components[n] for n in names if n.startswith("tokenizer")]
        self._zeros_for_empty = bool(pipeline.config.get("force_zeros_for_empty_prompt", False))
        self.fingerprint = _digest(
            *((weights_digest(encoder), _settings(encoder)) for encoder in self._encoders),
            *(_probe(tokenizer) for tokenizer in tokenizers),
            self._zeros_for_empty,
        )

    @torch.no_grad()
    def encode(self, caption: str | None) -> dict[str, Tensor]:
        """`prompt_embeds` (tokens x dim) and, where the family has them, `pooled_prompt_embeds` (dim).

        `None` is the unconditional embedding that the pipeline guides away from: zeros for SDXL, whose embedding of
        the empty text is another vector.
        """
        for encoder in self._encoders:
            encoder.to(self._device)
        with quiet_diffusers():  # the data check has named long captions
            # Families want different arguments; those that one does not know are left out.
            given = {"prompt_2": None, "prompt_3": None, "do_classifier_free_guidance": False}
            known = inspect.signature(self._pipeline.encode_prompt).parameters
            embeds = self._pipeline.encode_prompt(
                prompt=caption or "",
                device=self._device,
                num_images_per_prompt=1,
                **{name: value for name, value in given.items() if name in known},
            )
        found = {"prompt_embeds": embeds[0][0].float().cpu()}
        if len(embeds) > 2:  # FLUX gives (prompt, pooled, token places), SDXL and SD3 negatives at odd places
            found["pooled_prompt_embeds"] = embeds[2 if len(embeds) == 4 else 1][0].float().cpu()
        if caption is None and self._zeros_for_empty:
            found = {name: torch.zeros_like(value) for name, value in found.items()}
        return found

    def release(self) -> None:
        """Leave the accelerator."""
        for encoder in self._encoders:
            encoder.to("cpu")
        _empty_cache()


def _settings(model: Any) -> list[object]:
    """What changes the values of a CLIP text encoder or a VAE and can be seen in neither weights nor shapes."""
    names = ("hidden_act", "num_attention_heads", "layer_norm_eps", "eos_token_id", "act_fn", "norm_num_groups")
    return [getattr(model.config, name, None) for name in names]


def _probe(tokenizer: Any) -> list[list[int]]:
    return token_probe(lambda texts: tokenizer(texts, padding="max_length", truncation=True)["input_ids"])


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _empty_cache() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
