"""A trained adapter as the files that other tools load."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mmalign.errors import InputError
from mmalign.files import save_tensors, whole_file

from .kohya import kohya_metadata, kohya_tensors
from .lora import lora_config, lora_state, unwrap_model

__all__ = ["DIFFUSERS_FILE", "FORMATS", "export_formats", "export_lora"]

FORMATS = ("diffusers", "kohya")
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
# The rest of peft's configuration either does not change what is computed or is refused by other versions of peft.
_CONFIG = ("r", "lora_alpha", "use_rslora", "use_dora", "target_modules")


def export_lora(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    name: str = "lora",
    formats: Sequence[str] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> dict[str, Path]:
    """Write the adapter of a denoiser for diffusers and for kohya's tools and ComfyUI.

    - "diffusers": `pytorch_lora_weights.safetensors`, for `pipeline.load_lora_weights`. Gives the trained model's own
      output bit for bit in float32, with any alpha, rsLoRA and DoRA; these stand in the file's metadata, which
      ComfyUI does not read.
    - "kohya": `<name>.safetensors`, with original block names and an alpha in every layer. In diffusers, bit for bit
      as well where alpha is a float32 number; rsLoRA becomes alpha * sqrt(rank), rounded to one. For SDXL and SD 1.5,
      attention blocks, no DoRA: its magnitudes have no meaning that tools agree on, and diffusers ignores them.

    All weights are float32. Each file appears complete, or not at all; an earlier one of that name is replaced.

    Args:
        model: what `generation.lora.add_lora` was applied to, or its wrapper for distributed training.
        folder: is made where it is missing.
        name: of the kohya file, without suffix, as it will be listed in tools.
        formats: of `FORMATS`; `None` writes every format that can hold this adapter (see `export_formats`).
        metadata: further notes for the files' headers.

    Returns:
        The path of each format's file.

    Raises:
        InputError: no adapter, an unknown or unfit format, weights that are not finite, or a folder that cannot be
            written to.
    """
    state, config, family = lora_state(model), lora_config(model), _family_of(unwrap_model(model))
    formats = export_formats(model) if formats is None else tuple(formats)
    _check(state, formats, name, metadata)
    files: dict[str, tuple[Path, dict[str, Tensor], dict[str, str]]] = {}
    for format in formats:
        if format == "kohya":
            alpha = float(config.lora_alpha) * (math.sqrt(config.r) if config.use_rslora else 1)
            path, tensors = Path(folder, f"{name}.safetensors"), kohya_tensors(state, alpha, family)
            header = kohya_metadata(name, config.r, alpha, family)
        else:
            prefix = "unet" if family in ("sdxl", "sd15") else "transformer"
            path, tensors = Path(folder, DIFFUSERS_FILE), {f"{prefix}.{key}": value for key, value in state.items()}
            header = _diffusers_metadata(config, prefix)
        files[format] = path, tensors, {**(metadata or {}), **header}
    for path, tensors, header in files.values():
        with whole_file(path, durable=True, remedy="give another folder or free some space") as unfinished:
            save_tensors(tensors, unfinished, header)
    return {format: path for format, (path, _, _) in files.items()}


def export_formats(model: nn.Module) -> tuple[str, ...]:
    """The formats that can hold a model's adapter without loss. Known as soon as the adapter has been added.

    Raises:
        InputError: the model has no adapter.
    """
    state = lora_state(model)
    try:
        kohya_tensors(state, 1.0, _family_of(unwrap_model(model)))
    except InputError:
        return ("diffusers",)
    return FORMATS


def _check(state: Mapping[str, Tensor], formats: Sequence[str], name: str, metadata: Mapping[str, str] | None) -> None:
    unknown = [format for format in formats if format not in FORMATS]
    if unknown or not formats:
        raise InputError(f"formats must be some of {', '.join(FORMATS)}, not {list(formats)!r}")
    if not name or Path(name).name != name or f"{name}.safetensors" == DIFFUSERS_FILE:
        raise InputError(f"name must be a file's name without a folder, other than diffusers' own, not {name!r}")
    for key, value in (metadata or {}).items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise InputError(f"metadata must be text by text, not {key!r}: {value!r}")
    for layer, weights in state.items():
        if not weights.isfinite().all():
            raise InputError(
                f"{layer!r} holds values that are not finite, so nothing was written: training has diverged; take an "
                "earlier checkpoint"
            )


def _family_of(model: nn.Module) -> str:
    config = getattr(model, "config", {})
    kind = config.get("_class_name", type(model).__name__)
    if kind == "UNet2DConditionModel":
        return "sdxl" if config.get("addition_embed_type") == "text_time" else "sd15"
    known = {"SD3Transformer2DModel": "sd3", "FluxTransformer2DModel": "flux"}
    if kind not in known:
        raise InputError(f"the adapter's model is a {kind}, whose files are not known; give the denoiser of a pipeline")
    return known[kind]


def _diffusers_metadata(config: Any, prefix: str) -> dict[str, str]:
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY

    fields = {field: getattr(config, field) for field in _CONFIG}
    fields["target_modules"] = sorted(fields["target_modules"])
    text = json.dumps({f"{prefix}.{field}": value for field, value in fields.items()}, indent=2, sort_keys=True)
    return {"format": "pt", LORA_ADAPTER_METADATA_KEY: text}
