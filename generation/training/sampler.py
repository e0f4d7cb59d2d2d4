"""A pipeline without its text encoders, drawn with from embeddings that were made once."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["bare_pipeline", "embedded"]

_LATER = ("text_encoder", "tokenizer", "image_encoder", "feature_extractor", "safety_checker")


def bare_pipeline(pipeline: DiffusionPipeline, *, vae: bool, scheduler: Any = None) -> DiffusionPipeline:
    """The same denoiser without text encoders, and without the VAE unless asked for.

    A pipeline runs where its first component lies, and what is left out here stays off the GPU.

    Args:
        pipeline: of any family.
        vae: keep the VAE.
        scheduler: another one; by default a fresh one with the pipeline's own settings.
    """
    left_out = _LATER if vae else (*_LATER, "vae")
    parts = {name: None if name.startswith(left_out) else part for name, part in pipeline.components.items()}
    parts["scheduler"] = scheduler or type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    if "requires_safety_checker" in pipeline.config:
        parts["requires_safety_checker"] = False
    bare = type(pipeline)(**parts)
    bare.vae_scale_factor = pipeline.vae_scale_factor  # without a VAE it is taken to be 8
    bare.set_progress_bar_config(disable=True)
    return bare


def embedded(
    pipeline: DiffusionPipeline,
    embeddings: Sequence[Mapping[str, Tensor]],
    unconditional: Mapping[str, Tensor] | None,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Arguments of a pipeline's call that say what to draw.

    Args:
        pipeline: its call is looked at for names.
        embeddings: of each image, as `PromptEncoder.encode` returns them.
        unconditional: what to guide away from, the same for all; `None` where guidance is distilled (FLUX).
        device: of the network.
        dtype: of the network.
    """
    arguments = {name: torch.stack([one[name] for one in embeddings]).to(device, dtype) for name in embeddings[0]}
    if unconditional is not None:
        known = inspect.signature(type(pipeline).__call__).parameters
        for name, value in unconditional.items():
            if f"negative_{name}" in known:
                arguments[f"negative_{name}"] = value.to(device, dtype).expand(len(embeddings), *value.shape)
    return arguments
