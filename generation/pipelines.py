"""Text-to-image pipelines of diffusers, by hub id, folder, single file, or tiny."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mmalign.device import resolve_device, resolve_dtype
from mmalign.encoders.hub import causes_of, quiet_libraries, unavailable
from mmalign.errors import InputError, MMAlignError, ModelUnavailableError, reason_of

from .tiny import TINY_FAMILIES, tiny_pipeline

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DiffusionPipeline

__all__ = [
    "DEFAULT_MODEL",
    "FAMILIES",
    "denoiser_of",
    "guess_family",
    "load_pipeline",
    "pipeline_family",
    "pipeline_fingerprints",
    "quiet_diffusers",
    "weights_fingerprint",
]

DEFAULT_MODEL = "stabilityai/stable-diffusion-xl-base-1.0"

FAMILIES = {
    "sdxl": "StableDiffusionXLPipeline",
    "sd15": "StableDiffusionPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "flux": "FluxPipeline",
}
# What diffusers calls the layout of a single file -> family.
_LAYOUTS = {
    "xl_base": "sdxl",
    "playground-v2-5": "sdxl",
    "v1": "sd15",
    "v2": "sd15",
    "sd3": "sd3",
    "sd35_medium": "sd3",
    "sd35_large": "sd3",
    "flux-dev": "flux",
    "flux-schnell": "flux",
}
# Parts of names that models of a family go by; the first that is found counts.
_NAMES = {
    "sdxl": r"sd-?xl|-xl\b|playground-v2",
    "sd3": r"stable-diffusion-3|sd-?3",
    "flux": r"flux",
    "sd15": r"stable-diffusion-v?[12]|sd-?(v?[12]|turbo)|v1-5|v2-1",
}
_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PICKLES = {".ckpt", ".pt", ".pth", ".bin"}
_SINGLE_FILES = {".safetensors", *_PICKLES}


def load_pipeline(
    model: str | os.PathLike[str] | DiffusionPipeline = DEFAULT_MODEL,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    vae: str | os.PathLike[str] | None = None,
    unet: str | os.PathLike[str] | None = None,
    variant: str | None = None,
) -> DiffusionPipeline:
    """Load a text-to-image pipeline of a supported family (see `pipeline_family`), ready to use on `device`.

    In float16 SDXL's own VAE overflows to black images. It is therefore marked so that the pipeline decodes with it in
    float32, whatever its configuration says; a VAE named with `vae` is used as its own configuration says.

    Args:
        model: a hub id, a folder written by `save_pretrained`, a single .safetensors or .ckpt file in the layout that
            ComfyUI and others use, `tiny:sdxl` (or sd15, sd3, flux; see `generation.tiny`), or a pipeline, which is
            returned as it is.
        device: the fastest kind present by default.
        dtype: float32, bfloat16, float16, or auto: bfloat16 on a CUDA device that computes in it, float16 on an older
            one, float32 elsewhere.
        vae: another VAE: a hub id, its folder, a pipeline's folder that has one, or a single file.
        unet: another UNet of the same layout: a folder such as the `export/unet` of a full fine-tune, or a hub id.
        variant: which of several sets of weights in a folder or on the hub, such as "fp16".

    Raises:
        InputError: the model is of no supported family, damaged or not a pipeline; or a pipeline was given together
            with a device, dtype, VAE or variant.
        ModelUnavailableError: it is not on this machine and cannot be fetched.
    """
    if not isinstance(model, (str, os.PathLike)):
        pipeline_family(model)
        if device is not None or dtype != "auto" or any((vae, unet, variant)):
            raise InputError(
                "a pipeline that is already loaded is used as it is; leave out device, dtype, vae, unet and variant, "
                "or move it with pipeline.to(...)"
            )
        return model
    target = resolve_device(device)
    precision = resolve_dtype(dtype, target)
    with quiet_diffusers():
        parts = {} if vae is None else {"vae": _load_vae(vae, precision)}
        parts |= {} if unet is None else {"unet": _load_unet(unet, precision)}
        pipeline = _load(model, precision, variant, parts)
        _check_unet(model, pipeline, parts)
        if precision == torch.float16 and vae is None and pipeline_family(pipeline) == "sdxl":
            pipeline.vae.register_to_config(force_upcast=True)
        return pipeline.to(target)


def pipeline_family(pipeline: DiffusionPipeline) -> str:
    """sdxl, sd15 (all of Stable Diffusion 1 and 2), sd3 (with 3.5) or flux.

    Raises:
        InputError: it is another kind of pipeline, also one of these families that wants more than text.
    """
    name = type(pipeline).__name__
    for family, known in FAMILIES.items():
        if any(base.__name__ == known for base in type(pipeline).__mro__):
            return family
    raise InputError(f"{name} is not supported; give a text-to-image pipeline: one of {', '.join(FAMILIES.values())}")


def guess_family(model: str | os.PathLike[str]) -> str:
    """The family that a model is likely of, from its layout or else its name, without loading it; sdxl if in doubt."""
    name, path = os.fspath(model), Path(model)
    if name.startswith("tiny:") and name.removeprefix("tiny:") in FAMILIES:
        return name.removeprefix("tiny:")
    with contextlib.suppress(OSError, ValueError, AttributeError, StopIteration):
        kind = json.loads((path / "model_index.json").read_text(encoding="utf-8")).get("_class_name")
        return next(family for family, known in FAMILIES.items() if known == kind)
    if path.suffix == ".safetensors" and path.is_file():
        with contextlib.suppress(InputError):
            return _LAYOUTS[_single_file_layout(path)]
    return next((family for family, names in _NAMES.items() if re.search(names, path.name.lower())), "sdxl")


def denoiser_of(pipeline: DiffusionPipeline) -> tuple[str, nn.Module]:
    """The network that a pipeline draws with, and the name of this component: "unet" or "transformer".

    Raises:
        InputError: it has neither.
    """
    for name in ("unet", "transformer"):
        if (network := getattr(pipeline, name, None)) is not None:
            return name, network
    raise InputError(f"{type(pipeline).__name__} has neither a unet nor a transformer; give a whole pipeline")


def pipeline_fingerprints(pipeline: DiffusionPipeline) -> dict[str, str]:
    """What a pipeline draws with, by content: `weights_fingerprint` of each network, and the scheduler's settings."""
    networks = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    settings = {name: value for name, value in pipeline.scheduler.config.items() if not name.startswith("_")}
    fingerprints = {name: weights_fingerprint(part) for name, part in networks.items()}
    return fingerprints | {"scheduler": _short(json.dumps(settings, sort_keys=True, default=str))}


def weights_fingerprint(module: nn.Module) -> str:
    """A short name for a module's parameters as they are, in their order and precision; equal on every device.

    It is made of exact sums over their bits, as moving 5 GB off the device to hash them would take longer than
    drawing an image.
    """
    return _short("".join(f"{tuple(p.shape)} {p.dtype} {_bit_sums(p)}" for p in module.parameters()))


def _bit_sums(tensor: torch.Tensor) -> list[int]:
    """Sums, modulo 2^64, of a tensor's values read as whole numbers, of their squares, and of values by places."""
    if tensor.device.type == "meta":
        return []
    bits = tensor.detach().contiguous().view(-1).view(_WHOLE[tensor.element_size()])
    size = 1 << 16 if bits.device.type == "cpu" else 1 << 25  # what fits a cache; what does not fill a GPU
    sums = torch.zeros(3, dtype=torch.int64, device=bits.device)
    for number, part in enumerate(bits.split(size)):
        values = part.long()
        places = torch.arange(len(values), device=bits.device) + number * size
        sums += torch.stack([values.sum(), (values * values).sum(), (values * places).sum()])
    return sums.tolist()


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextlib.contextmanager
def quiet_diffusers() -> Iterator[None]:
    """Keep diffusers and transformers from printing bars, warnings and failures that an exception says better."""
    from diffusers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with quiet_libraries(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if bars:
            logging.enable_progress_bar()


def _load(
    model: str | os.PathLike[str], dtype: torch.dtype, variant: str | None, parts: dict[str, Any]
) -> DiffusionPipeline:
    name, path = os.fspath(model), Path(model)
    if isinstance(model, str) and name.startswith("tiny:"):
        pipeline = tiny_pipeline(name.removeprefix("tiny:"))
        _check_unet(model, pipeline, parts)
        pipeline.register_modules(**parts)
        return pipeline.to(dtype)
    if path.is_dir():
        return _load_folder(path, dtype, variant, parts)
    if path.is_file():
        return _load_file(path, dtype, parts)
    if path.suffix in _SINGLE_FILES or path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise InputError(f"model {name!r} does not exist; give a pipeline's folder, a .safetensors file, or a hub id")
    if "/" not in name:
        raise InputError(
            f"model {name!r} is neither a folder nor a file nor a hub id such as {DEFAULT_MODEL!r}; "
            f"to try things out there is {', '.join(f'tiny:{family}' for family in TINY_FAMILIES)}"
        )
    return _load_hub(name, dtype, variant, parts)


def _load_folder(folder: Path, dtype: torch.dtype, variant: str | None, parts: dict[str, Any]) -> DiffusionPipeline:
    from diffusers import DiffusionPipeline

    try:
        layout = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        adapter = (folder / "pytorch_lora_weights.safetensors").is_file() or (folder / "adapter_config.json").is_file()
        remedy = "it is an adapter: give it as adapter" if adapter else "give a folder written by save_pretrained"
        raise InputError(f"{folder} has no model_index.json, so it is not a pipeline; {remedy}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / 'model_index.json'} cannot be read ({reason_of(error)}); save it again") from None
    if layout.get("_class_name") not in FAMILIES.values():
        raise InputError(
            f"{folder} holds a {layout.get('_class_name')}, which is not supported; give one of "
            f"{', '.join(FAMILIES.values())}"
        )
    wanted = [name for name, kind in layout.items() if isinstance(kind, list) and kind[0] and name not in parts]
    missing = [name for name in wanted if not (folder / name).is_dir()]
    if missing:
        raise InputError(f"{folder} lacks {', '.join(f'{name}/' for name in missing)}; copy the whole pipeline again")
    try:
        return DiffusionPipeline.from_pretrained(
            folder, torch_dtype=dtype, variant=variant, local_files_only=True, **parts
        )
    except Exception as error:
        raise InputError(_variant_hint(f"pipeline {folder}", error, variant)) from None


def _load_hub(name: str, dtype: torch.dtype, variant: str | None, parts: dict[str, Any]) -> DiffusionPipeline:
    from diffusers import DiffusionPipeline

    try:
        pipeline = DiffusionPipeline.from_pretrained(name, torch_dtype=dtype, variant=variant, **parts)
    except Exception as error:
        if variant is not None and f"variant={variant}" in str(error):
            raise InputError(_variant_hint(f"model {name!r}", error, variant)) from None
        ways_out = "give a pipeline's folder or file (`tiny:sdxl` works offline, to try things out)"
        raise _unavailable(name, error, "model", ways_out) from None
    pipeline_family(pipeline)
    return pipeline


def _variant_hint(what: str, error: BaseException, variant: str | None) -> str:
    if variant is not None and f"variant={variant}" in str(error):
        return f"{what} has no weights of variant {variant!r}; leave the variant out"
    return f"{what} cannot be loaded ({reason_of(error)}); copy or save it again"


def _load_file(path: Path, dtype: torch.dtype, parts: dict[str, Any]) -> DiffusionPipeline:
    """A whole pipeline in one file; its configuration and tokenizers come from the hub's cache.

    Pickles are read by diffusers with `weights_only`, so that nothing in them runs.
    """
    import diffusers
    from diffusers.loaders.single_file_utils import DIFFUSERS_DEFAULT_PIPELINE_PATHS

    layout = _single_file_layout(path)
    try:
        return getattr(diffusers, FAMILIES[_LAYOUTS[layout]]).from_single_file(str(path), torch_dtype=dtype, **parts)
    except Exception as error:
        if _is_about_the_hub(error):
            repository = DIFFUSERS_DEFAULT_PIPELINE_PATHS[layout]["pretrained_model_name_or_path"]
            what = f"the configuration of {path.name}, a few small files of"
            raise _unavailable(repository, error, what, "give a pipeline's folder") from None
        raise InputError(
            f"model {path} cannot be loaded ({reason_of(error)}); "
            "give a file that holds the whole pipeline, or a folder"
        ) from None


def _single_file_layout(path: Path) -> str:
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    shapes = _tensor_shapes(path)
    if any("lora_" in key or ".lora" in key for key in shapes):
        raise InputError(f"{path} is an adapter, not a model; give it as adapter and its base as model")
    layout = infer_diffusers_model_type(shapes)
    # diffusers takes everything that it does not know for Stable Diffusion 1.
    if layout == "v1" and "model.diffusion_model.input_blocks.0.0.weight" not in shapes:
        raise InputError(
            f"{path} is not SDXL, SD 1 to 3.5 or FLUX in one file (it begins with "
            f"{min(shapes, default='nothing')!r}); a part of a pipeline is loaded by the folder with model_index.json"
        )
    if layout not in _LAYOUTS:
        raise InputError(f"{path} is of kind {layout}, which is not supported; give SDXL, SD 1 to 3.5 or FLUX")
    return layout


def _tensor_shapes(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file by name, without their data."""
    from diffusers.models.model_loading_utils import load_state_dict
    from safetensors import SafetensorError, safe_open

    if path.suffix in _PICKLES:
        try:
            state = load_state_dict(str(path), map_location="meta")
            while "state_dict" in state:
                state = state["state_dict"]
        except Exception:
            raise InputError(
                f"{path} is damaged, or holds more than weights and could run code when read; "
                "convert it to .safetensors, or take the model's .safetensors file"
            ) from None
        return {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    if path.suffix != ".safetensors":
        raise InputError(
            f"model {path} is a {path.suffix or 'nameless'} file; give a .safetensors or .ckpt file, or a folder"
        )
    try:
        with safe_open(path, "pt") as file:
            return {key: torch.empty(file.get_slice(key).get_shape(), device="meta") for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is damaged ({reason_of(error)}); download or copy it again") from None


def _load_vae(vae: str | os.PathLike[str], dtype: torch.dtype) -> AutoencoderKL:
    from diffusers import AutoencoderKL

    path = Path(vae)
    try:
        if path.is_file():
            return AutoencoderKL.from_single_file(str(path), torch_dtype=dtype)
        subfolder = {"subfolder": "vae"} if (path / "vae").is_dir() else {}
        return AutoencoderKL.from_pretrained(os.fspath(vae), torch_dtype=dtype, **subfolder)
    except Exception as error:
        if path.exists() and not _is_about_the_hub(error):
            raise InputError(f"VAE {path} cannot be loaded ({reason_of(error)}); give an AutoencoderKL") from None
        raise _unavailable(os.fspath(vae), error, "VAE", "give a folder or file") from None


def _check_unet(model: str | os.PathLike[str], pipeline: DiffusionPipeline, parts: dict[str, Any]) -> None:
    if "unet" in parts and pipeline_family(pipeline) not in ("sdxl", "sd15"):
        raise InputError(f"model {os.fspath(model)!r} has no UNet; leave out unet")


def _load_unet(unet: str | os.PathLike[str], dtype: torch.dtype) -> Any:
    from diffusers import UNet2DConditionModel

    path = Path(unet)
    try:
        subfolder = {"subfolder": "unet"} if (path / "unet").is_dir() else {}
        return UNet2DConditionModel.from_pretrained(os.fspath(unet), torch_dtype=dtype, **subfolder)
    except Exception as error:
        if path.exists() and not _is_about_the_hub(error):
            raise InputError(f"UNet {path} cannot be loaded ({reason_of(error)}); give a folder of one") from None
        raise _unavailable(os.fspath(unet), error, "UNet", "give a folder") from None


def _unavailable(name: str, error: BaseException, what: str, remedy: str) -> MMAlignError:
    return unavailable(name, error, what=what, remedy=remedy, error_class=ModelUnavailableError)


def _is_about_the_hub(error: BaseException) -> bool:
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    kinds = (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError)
    return any(isinstance(cause, kinds) or "huggingface.co" in str(cause) for cause in causes_of(error))
