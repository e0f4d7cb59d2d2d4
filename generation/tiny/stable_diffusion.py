"""Tiny SDXL and SD 1.5: UNets with the block types, layers and attention placement of the full models."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .components import CLIP_WIDTH, clip_encoder, make_vae, randomise, unit_output
from .tokenizers import VOCABULARY_SIZE, clip_tokenizer

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel

__all__ = ["build_sd15", "build_sdxl"]

_NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
_END = VOCABULARY_SIZE - 1


def build_sdxl(generator: torch.Generator, deep: bool) -> StableDiffusionXLPipeline:
    """Two text encoders, size conditioning, attention at the two lower of three resolutions."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    pooled, time_dim = CLIP_WIDTH, 8
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16, 16),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(1, 2, 2),  # in SDXL, too, these are numbers of heads
        transformer_layers_per_block=(1, 2, 10) if deep else (1, 1, 2),
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=time_dim,
        projection_class_embeddings_input_dim=6 * time_dim + pooled,
        cross_attention_dim=2 * CLIP_WIDTH,
    )
    conditions = {
        "text_embeds": torch.randn(4, pooled, generator=generator),
        "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 4),
    }
    return StableDiffusionXLPipeline(
        unet=_unit_noise(unet, generator, added_cond_kwargs=conditions),
        vae=make_vae(generator, scaling_factor=0.13025, force_upcast=True, sample_size=64),
        text_encoder=clip_encoder(generator, projected=False, pad=_END),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_encoder(generator, projected=True, pad=0),
        tokenizer_2=clip_tokenizer(pad_token="!"),
        scheduler=EulerDiscreteScheduler(**_NOISE, timestep_spacing="leading"),
        add_watermarker=False,
    )


def build_sd15(generator: torch.Generator, deep: bool) -> StableDiffusionPipeline:
    """One text encoder, attention at the upper three of four resolutions, projections as 1 x 1 convolutions."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16, 16, 16),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        attention_head_dim=2,
        norm_num_groups=4,
        cross_attention_dim=CLIP_WIDTH,
    )
    return StableDiffusionPipeline(
        unet=_unit_noise(unet, generator),
        vae=make_vae(generator, scaling_factor=0.18215, force_upcast=False, sample_size=64),
        text_encoder=clip_encoder(generator, projected=False, pad=_END),
        tokenizer=clip_tokenizer(),
        scheduler=PNDMScheduler(**_NOISE, skip_prk_steps=True, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _unit_noise(unet: UNet2DConditionModel, generator: torch.Generator, **extra: object) -> UNet2DConditionModel:
    """Random weights whose answer to noise and random text has variance 1, as a noise predictor's has."""
    randomise(unet, generator)
    latents = torch.randn(4, 4, 8, 8, generator=generator)
    texts = torch.randn(4, 77, unet.config.cross_attention_dim, generator=generator)
    with torch.no_grad():
        noise = unet(latents, torch.tensor([100, 400, 700, 900]), texts, **extra).sample
    unit_output(unet.conv_out, noise)
    return unet
