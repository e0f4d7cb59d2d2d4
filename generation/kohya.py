"""The adapter format of kohya's sd-scripts, which ComfyUI, A1111, Forge and InvokeAI read.

A layer's name is flattened (`lora_unet_` and underscores for dots) and carries three tensors: `lora_down.weight`,
`lora_up.weight` and `alpha`; the update is `alpha / rank * up @ down`. SDXL's layers go by the names of the original
checkpoint (`input_blocks.4.1...`), SD 1.5's by those of diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from mmalign.errors import InputError

__all__ = ["kohya_metadata", "kohya_tensors", "original_block_name"]

# (block, index, attention) of diffusers to the original: three numbered blocks to a resolution, the first input
# block being the convolution of the latent; attention is the second module of its block.
_BLOCKS = re.compile(r"(?:(down|up)_blocks\.(\d)\.|(mid)_block\.)attentions\.(\d)\.(.+)")
_BASE_VERSIONS = {"sdxl": "sdxl_base_v1-0", "sd15": "sd_v1"}
_ARCHITECTURES = {"sdxl": "stable-diffusion-xl-v1-base/lora", "sd15": "stable-diffusion-v1/lora"}


def original_block_name(path: str, family: str = "sdxl") -> str:
    """The name by which kohya's tools know a layer of the UNet.

    Args:
        path: dotted name in diffusers, inside an attention block:
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q".
        family: "sdxl" or "sd15". For SD 1.5 the name stays as it is.

    Returns:
        The dotted name: "input_blocks.4.1.transformer_blocks.0.attn1.to_q".

    Raises:
        InputError: another family, or a layer outside the attention blocks.
    """
    if family not in _BASE_VERSIONS:
        raise InputError(f"the kohya format is written for sdxl and sd15, not {family!r}; export to diffusers' alone")
    match = _BLOCKS.fullmatch(path)
    if match is None:
        raise InputError(
            f"the layer {path!r} has no place in the kohya format, which is written for attention blocks only;"
            " choose other targets, or export to diffusers' format alone"
        )
    if family == "sd15":
        return path
    side, block, mid, attention, rest = match.groups()
    if mid:
        return f"middle_block.1.{rest}"
    number = 3 * int(block) + int(attention)
    return f"input_blocks.{number + 1}.1.{rest}" if side == "down" else f"output_blocks.{number}.1.{rest}"


def kohya_tensors(state: Mapping[str, Tensor], alpha: float, family: str) -> dict[str, Tensor]:
    """Rename peft's weights, and give every layer its `alpha`, in float32.

    Args:
        state: `<layer>.lora_A.weight` (rank x in) and `<layer>.lora_B.weight` (out x rank) for every layer.
        alpha: such that the update is alpha / rank * B A; for rsLoRA, its own alpha times sqrt(rank).
        family: "sdxl" or "sd15".

    Raises:
        InputError: a layer or family without a name in this format, or magnitudes (DoRA).
    """
    tensors = {}
    for key, value in state.items():
        layer, _, part = key.partition(".lora_")
        if part not in ("A.weight", "B.weight"):
            # Readers disagree on what divides `dora_scale`: the norms of the rows of W + BA, which peft trains with, or
            # those of W (ComfyUI, see its pull request 15458), or of columns (older ones); diffusers 0.42 drops it.
            raise InputError(
                "a DoRA adapter cannot be written in kohya's format, which tools read in ways that change the result;"
                " export to diffusers' format alone"
            )
        name = "lora_unet_" + original_block_name(layer, family).replace(".", "_")
        if part == "A.weight":
            tensors[f"{name}.lora_down.weight"] = value
            tensors[f"{name}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
        else:
            tensors[f"{name}.lora_up.weight"] = value
    return tensors


def kohya_metadata(name: str, rank: int, alpha: float, family: str) -> dict[str, str]:
    """What tools show about the file and sort it by."""
    return {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(alpha),
        "ss_base_model_version": _BASE_VERSIONS[family],
        "ss_v2": "False",
        "ss_output_name": name,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": _ARCHITECTURES[family],
        "modelspec.title": name,
    }
