"""Tiny SD3 and FLUX: transformers with one block of every kind that the full models have."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .components import CLIP_WIDTH, clip_encoder, make_vae, randomise, t5_encoder, unit_output
from .tokenizers import VOCABULARY_SIZE, clip_tokenizer, t5_tokenizer

if TYPE_CHECKING:
    from diffusers import FluxPipeline, StableDiffusion3Pipeline

__all__ = ["build_flux", "build_sd3"]

_WIDE_VAE = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False, "sample_size": 64}
_END = VOCABULARY_SIZE - 1
_TIMES = (100.0, 400.0, 700.0, 900.0)


def build_sd3(generator: torch.Generator, deep: bool) -> StableDiffusion3Pipeline:
    """Two joint blocks, the first with SD3.5 medium's second attention, the last without text output."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    text_width = 4 * CLIP_WIDTH  # as in the full model, twice what the two CLIP encoders fill
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=text_width,
        caption_projection_dim=16,
        pooled_projection_dim=2 * CLIP_WIDTH,
        pos_embed_max_size=32,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    randomise(transformer, generator)
    with torch.no_grad():
        velocity = transformer(
            hidden_states=torch.randn(4, 16, 8, 8, generator=generator),
            encoder_hidden_states=torch.randn(4, 77, text_width, generator=generator),
            pooled_projections=torch.randn(4, 2 * CLIP_WIDTH, generator=generator),
            timestep=torch.tensor(_TIMES),
        ).sample
    unit_output(transformer.proj_out, velocity)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        vae=make_vae(generator, scaling_factor=1.5305, shift_factor=0.0609, **_WIDE_VAE),
        text_encoder=clip_encoder(generator, projected=True, pad=_END),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_encoder(generator, projected=True, pad=0),
        tokenizer_2=clip_tokenizer(pad_token="!"),
        text_encoder_3=t5_encoder(generator, text_width),
        tokenizer_3=t5_tokenizer(512),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def build_flux(generator: torch.Generator, deep: bool) -> FluxPipeline:
    """One double and one single block, with the guidance embedding of FLUX.1-dev."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=CLIP_WIDTH,
        pooled_projection_dim=CLIP_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )
    randomise(transformer, generator)
    with torch.no_grad():
        velocity = transformer(
            hidden_states=torch.randn(4, 16, 64, generator=generator),
            encoder_hidden_states=torch.randn(4, 77, CLIP_WIDTH, generator=generator),
            pooled_projections=torch.randn(4, CLIP_WIDTH, generator=generator),
            timestep=torch.tensor(_TIMES) / 1000,
            guidance=torch.full((4,), 3.5),
            img_ids=FluxPipeline._prepare_latent_image_ids(4, 4, 4, torch.device("cpu"), torch.float32),
            txt_ids=torch.zeros(77, 3),
        ).sample
    unit_output(transformer.proj_out, velocity)
    return FluxPipeline(
        transformer=transformer,
        vae=make_vae(generator, scaling_factor=0.3611, shift_factor=0.1159, **_WIDE_VAE),
        text_encoder=clip_encoder(generator, projected=False, pad=_END),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(generator, CLIP_WIDTH),
        tokenizer_2=t5_tokenizer(512),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, shift=3.0, base_shift=0.5, max_shift=1.15, base_image_seq_len=256
        ),
    )
