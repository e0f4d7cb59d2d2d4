"""Pictures of how the model draws while it is trained, within the memory that training takes anyway."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmalign.imaging.contact_sheet import draw_contact_sheet

from ..latents import to_picture, unit_pixels, unpacked
from ..pipelines import denoiser_of, pipeline_family
from .configuration import RunConfig
from .encoding import LatentEncoder, PromptEncoder
from .sampler import bare_pipeline, embedded

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["Validation"]


class Validation:
    """Renders fixed prompts with fixed seeds, one image at a time; embeddings are made once, before the encoders go."""

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        prompts: PromptEncoder,
        latents: LatentEncoder,
        config: RunConfig,
        *,
        release: bool = True,
    ) -> None:
        """`release`: after each rendering the VAE leaves the accelerator; not where training decodes with it."""
        self._config, self._latents, self._releases = config, latents, release
        self._embeddings = [(text, prompts.encode(text)) for text in config.validation_prompts]
        self._unconditional = None if pipeline_family(pipeline) == "flux" else prompts.encode(None)
        self._pipeline = bare_pipeline(pipeline, vae=False)

    @torch.no_grad()
    def render(self, network: nn.Module, path: Path, title: str) -> Path:
        """Draw every prompt into one picture at `path`."""
        device = next(network.parameters()).device
        was_training = network.training
        network.eval()
        try:
            latents = [self._sample(embeddings, device, i) for i, (_, embeddings) in enumerate(self._embeddings)]
        finally:
            network.train(was_training)
        rows = []
        for (text, _), latent in zip(self._embeddings, latents, strict=True):
            rows.append((text, [(to_picture(unit_pixels(self._latents.decode(latent))), title)]))
        if self._releases:
            self._latents.release()
        path.parent.mkdir(exist_ok=True)
        return draw_contact_sheet(rows, path, cell=min(512, max(256, self._config.resolution)))

    def _sample(self, embeddings: dict[str, Tensor], device: torch.device, seed: int) -> Tensor:
        dtype = next(denoiser_of(self._pipeline)[1].parameters()).dtype
        guided = embedded(self._pipeline, [embeddings], self._unconditional, device, dtype)
        config = self._config
        side = config.resolution
        latents = self._pipeline(
            **guided,
            num_inference_steps=config.validation_steps,
            guidance_scale=config.validation_guidance,
            height=side,
            width=side,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
        ).images
        return unpacked(self._pipeline, latents, height=side, width=side)[0]
