"""A trained adapter as the files that other tools load."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mmalign.device import resolve_dtype
from mmalign.errors import InputError

from .kohya import kohya_metadata, kohya_tensors
from .lora import lora_config, lora_state, unwrap_model

__all__ = ["FORMATS", "export_formats", "export_lora"]

FORMATS = ("diffusers", "kohya")
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
_COMPONENTS = {"sdxl": "unet", "sd15": "unet", "sd3": "transformer", "flux": "transformer"}
# The rest of peft's configuration either does not change what is computed or is refused by other versions of peft.
_CONFIG = ("r", "lora_alpha", "use_rslora", "use_dora", "target_modules")


def export_lora(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    name: str = "lora",
    family: str = "sdxl",
    formats: Sequence[str] | None = None,
    dtype: str = "float32",
    metadata: Mapping[str, str] | None = None,
) -> dict[str, Path]:
    """Write the adapter of a denoiser for diffusers and for kohya's tools and ComfyUI.

    - "diffusers": `pytorch_lora_weights.safetensors`, for `pipeline.load_lora_weights`. Gives the trained model's own
      output bit for bit in float32, with any alpha, rsLoRA and DoRA; these stand in the file's metadata, which
      ComfyUI does not read.
    - "kohya": `<name>.safetensors`, with original block names and an alpha in every layer. In diffusers, bit for bit
      as well where alpha is a float32 number; rsLoRA becomes alpha * sqrt(rank), rounded to one. For SDXL and SD 1.5,
      attention blocks, no DoRA: its magnitudes have no meaning that tools agree on, and diffusers ignores them.

    Each file appears complete, or not at all; an earlier one of that name is replaced.

    Args:
        model: what `generation.lora.add_lora` was applied to, or its wrapper for distributed training.
        folder: is made where it is missing.
        name: of the kohya file, without suffix, as it will be listed in tools.
        family: "sdxl", "sd15", "sd3" or "flux".
        formats: of `FORMATS`; `None` writes every format that can hold this adapter (see `export_formats`).
        dtype: of the weights in the files: "float32", "bfloat16" or "float16". Alphas stay float32.
        metadata: further notes for the files' headers.

    Returns:
        The path of each format's file.

    Raises:
        InputError: no adapter, an unknown or unfit format, weights that are not finite in `dtype`, or a folder that
            cannot be written to.
    """
    state, config = lora_state(model), lora_config(model)
    formats = export_formats(model, family) if formats is None else tuple(formats)
    _check(model, formats, name, family, metadata)
    weights = _cast(state, dtype)
    files: dict[str, tuple[Path, dict[str, Tensor], dict[str, str]]] = {}
    for format in formats:
        if format == "kohya":
            alpha = float(config.lora_alpha) * (math.sqrt(config.r) if config.use_rslora else 1)
            path, tensors = Path(folder, f"{name}.safetensors"), kohya_tensors(weights, alpha, family)
            header = kohya_metadata(name, config.r, alpha, family)
        else:
            prefix = _COMPONENTS[family]
            path, tensors = Path(folder, DIFFUSERS_FILE), {f"{prefix}.{key}": value for key, value in weights.items()}
            header = _diffusers_metadata(config, prefix)
        files[format] = path, tensors, {**(metadata or {}), **header}
    for path, tensors, header in files.values():
        _write(path, tensors, header)
    return {format: path for format, (path, _, _) in files.items()}


def export_formats(model: nn.Module, family: str = "sdxl") -> tuple[str, ...]:
    """The formats that can hold a model's adapter without loss. Known as soon as the adapter has been added.

    Raises:
        InputError: the model has no adapter.
    """
    state = lora_state(model)
    try:
        kohya_tensors(state, 1.0, family)
    except InputError:
        return ("diffusers",)
    return FORMATS


def _check(
    model: nn.Module, formats: Sequence[str], name: str, family: str, metadata: Mapping[str, str] | None
) -> None:
    if family not in _COMPONENTS:
        raise InputError(f"family {family!r} is not known; use one of {', '.join(_COMPONENTS)}")
    found = _family_of(unwrap_model(model))
    if found is not None and found != family:
        raise InputError(f"the adapter's model is {found}, not {family}; give family={found!r}")
    unknown = [format for format in formats if format not in FORMATS]
    if unknown or not formats:
        raise InputError(f"formats must be some of {', '.join(FORMATS)}, not {list(formats)!r}")
    if not name or Path(name).name != name or f"{name}.safetensors" == DIFFUSERS_FILE:
        raise InputError(f"name must be a file's name without a folder, other than diffusers' own, not {name!r}")
    for key, value in (metadata or {}).items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise InputError(f"metadata must be text by text, not {key!r}: {value!r}")


def _family_of(model: nn.Module) -> str | None:
    config = getattr(model, "config", {})
    kind = config.get("_class_name", type(model).__name__)
    if kind == "UNet2DConditionModel":
        return "sdxl" if config.get("addition_embed_type") == "text_time" else "sd15"
    return {"SD3Transformer2DModel": "sd3", "FluxTransformer2DModel": "flux"}.get(kind)


def _diffusers_metadata(config: Any, prefix: str) -> dict[str, str]:
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY

    fields = {field: getattr(config, field) for field in _CONFIG}
    fields["target_modules"] = sorted(fields["target_modules"])
    text = json.dumps({f"{prefix}.{field}": value for field, value in fields.items()}, indent=2, sort_keys=True)
    return {"format": "pt", LORA_ADAPTER_METADATA_KEY: text}


def _cast(state: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    weights = {key: value.to(resolve_dtype(dtype)) for key, value in state.items()}
    for key, value in weights.items():
        if not value.isfinite().all():
            cause = "training has diverged" if not state[key].isfinite().all() else f"too large for {dtype}"
            raise InputError(f"{key!r} holds values that are not finite ({cause}); nothing was written")
    return weights


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    unfinished = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, unfinished, metadata=metadata)
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        unfinished.chmod(0o644)
        unfinished.replace(path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise InputError(f"{str(path)!r} cannot be written ({error}); give another folder or free some space") from None
