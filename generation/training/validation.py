"""Pictures of how the model draws while it is trained, within the memory that training takes anyway."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn

from mmalign.imaging.contact_sheet import draw_contact_sheet

from ..pipelines import denoiser_of
from .configuration import TrainingConfig
from .encoding import LatentEncoder, PromptEncoder

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["Validation"]

_LATER = ("vae", "text_encoder", "tokenizer", "image_encoder", "feature_extractor", "safety_checker")


class Validation:
    """Renders fixed prompts with fixed seeds, one image at a time; embeddings are made once, before the encoders go."""

    def __init__(
        self, pipeline: DiffusionPipeline, prompts: PromptEncoder, latents: LatentEncoder, config: TrainingConfig
    ) -> None:
        self._config, self._latents = config, latents
        self._embeddings = [(text, prompts.encode(text)) for text in config.validation_prompts]
        self._unconditional = prompts.encode(None)
        # The same denoiser without VAE and text encoders: a pipeline runs where its first component lies, and those
        # stay off the GPU.
        parts = {name: None if name.startswith(_LATER) else part for name, part in pipeline.components.items()}
        parts["scheduler"] = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
        if "requires_safety_checker" in pipeline.config:
            parts["requires_safety_checker"] = False
        self._pipeline = type(pipeline)(**parts)
        self._pipeline.set_progress_bar_config(disable=True)

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
            decoded = (self._latents.decode(latent) / 2 + 0.5).clamp(0, 1).mul(255).round().byte()
            image = Image.fromarray(decoded.permute(1, 2, 0).contiguous().numpy())
            rows.append((text, [(image, title)]))
        self._latents.release()
        path.parent.mkdir(exist_ok=True)
        return draw_contact_sheet(rows, path, cell=min(512, max(256, self._config.resolution)))

    def _sample(self, embeddings: dict[str, Tensor], device: torch.device, seed: int) -> Tensor:
        dtype = next(denoiser_of(self._pipeline)[1].parameters()).dtype
        guided: dict[str, Any] = {name: value[None].to(device, dtype) for name, value in embeddings.items()}
        guided |= {f"negative_{name}": value[None].to(device, dtype) for name, value in self._unconditional.items()}
        config = self._config
        return self._pipeline(
            **guided,
            num_inference_steps=config.validation_steps,
            guidance_scale=config.validation_guidance,
            height=config.resolution,
            width=config.resolution,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
        ).images[0]
