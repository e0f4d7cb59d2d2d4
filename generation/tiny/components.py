"""Text encoders and VAEs shared by the tiny families, and the scale of their random weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .tokenizers import VOCABULARY_SIZE

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

__all__ = ["CLIP_WIDTH", "clip_encoder", "make_vae", "randomise", "t5_encoder", "unit_output"]

CLIP_WIDTH = 32


def clip_encoder(
    generator: torch.Generator, *, projected: bool, pad: int
) -> CLIPTextModel | CLIPTextModelWithProjection:
    """A text tower of width 32; `projected` adds the projection that SDXL's second and SD3's encoders have."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=CLIP_WIDTH,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=3,
        projection_dim=CLIP_WIDTH,
        hidden_act="gelu",
        max_position_embeddings=77,
        bos_token_id=VOCABULARY_SIZE - 2,
        eos_token_id=VOCABULARY_SIZE - 1,
        pad_token_id=pad,
    )
    return randomise((CLIPTextModelWithProjection if projected else CLIPTextModel)(config), generator)


def t5_encoder(generator: torch.Generator, width: int) -> T5EncoderModel:
    """A T5 v1.1 encoder of two layers."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=VOCABULARY_SIZE,
        d_model=width,
        d_kv=8,
        d_ff=37,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    return randomise(T5EncoderModel(config), generator)


def make_vae(generator: torch.Generator, **config: Any) -> AutoencoderKL:
    """A VAE that divides height and width by 8, as those of the full models do.

    Latents of noise images, shifted and scaled as the pipelines do, have variance 1, and such latents decode to images
    that fill the range. The posterior is narrow (log variance about -6), as that of a trained VAE is.
    """
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        block_out_channels=(4, 8, 8, 8),
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=1,
        norm_num_groups=4,
        **config,
    )
    randomise(vae, generator)
    channels = vae.config.latent_channels
    last = vae.quant_conv if vae.quant_conv is not None else vae.encoder.conv_out
    images = torch.rand(4, 3, 64, 64, generator=generator) * 2 - 1
    with torch.no_grad():
        means, spreads = vae.encode(images).latent_dist.parameters.chunk(2, dim=1)
        axes = (0, 2, 3)
        gain = 1 / (vae.config.scaling_factor * means.std(axes))
        last.weight[:channels] *= gain[:, None, None, None]
        centre = (means.mean(axes) - last.bias[:channels]) * gain
        last.bias[:channels] = (vae.config.shift_factor or 0.0) - centre
        last.weight[channels:] *= 0.1 / spreads.std(axes)[:, None, None, None]
        last.bias[channels:] = -6.0
        latents = torch.randn(4, channels, 8, 8, generator=generator) / vae.config.scaling_factor
        decoded = vae.decode(latents + (vae.config.shift_factor or 0.0)).sample
        unit_output(vae.decoder.conv_out, decoded, 0.5)
    return vae


def randomise(model: nn.Module, generator: torch.Generator) -> Any:
    """Give every weight a value from `generator` that passes on the variance of its input, and freeze for inference.

    An initialisation as for training starts near zero in many places, where all prompts look the same.
    """
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            noise /= max(parameter[0].numel(), 1) ** 0.5
        else:
            noise = 0.1 * noise + (0.0 if name.endswith("bias") else 1.0)
        parameter.data.copy_(noise)
    return model.eval()


@torch.no_grad()
def unit_output(last: nn.Module, output: torch.Tensor, std: float = 1.0) -> None:
    """Rescale the last layer so that `output`, which it just gave, has mean 0 and this standard deviation."""
    weight, bias = last.weight, last.bias
    gain = std / output.std()
    weight *= gain  # type: ignore[operator]
    bias.copy_((bias - output.mean()) * gain)  # type: ignore[operator]
