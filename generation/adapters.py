"""LoRA files and soft tokens on a pipeline for a while, with proof that they were applied.

diffusers loads what fits and only warns about the rest, so that an adapter of another model can seem to be loaded and
do nothing. Here every matrix of the file has to find its layer. Soft tokens (`generation.soft_tokens`) are told by the
file's own metadata, and go together with LoRAs.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mmalign.checks import in_range
from mmalign.encoders.hub import unavailable
from mmalign.errors import InputError, ModelUnavailableError, reason_of
from mmalign.files import sha256_of

from .pipelines import denoiser_of, pipeline_family, quiet_diffusers
from .soft_tokens import SoftTokens, holds_soft_tokens

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import nn

__all__ = ["Adapter", "adapter_family", "adapters_applied", "find_adapter", "find_adapters"]

_DOWN = re.compile(r"(^|[._])lora(_A|_down|\.down|_linear_layer\.down)\.weight$|lora_embedding_A$")
_UP = re.compile(r"(^|[._])lora(_B|_up|\.up|_linear_layer\.up)\.weight$|lora_embedding_B$")


@dataclass(frozen=True, slots=True)
class Adapter:
    """A file of a LoRA or of soft tokens, and the weight it is to be applied with; 1 is what it was trained for."""

    name: str
    file: Path
    weight: float = 1.0

    def to_dict(self) -> dict[str, object]:
        """What identifies it, the content by its SHA-256."""
        return {"adapter": self.name, "sha256": sha256_of(self.file), "weight": self.weight}


@contextlib.contextmanager
def adapters_applied(pipeline: DiffusionPipeline, adapters: Sequence[Adapter]) -> Iterator[None]:
    """Within the block `pipeline` has `adapters`, each with its weight; afterwards it is what it was.

    An adapter of weight 0 is checked and then left out, so that the result equals that without it bit for bit.

    Raises:
        InputError: a file fits this pipeline not at all or in part, is damaged, or is in a format that diffusers
            cannot apply in full; soft tokens have another weight than 0 and 1; or the pipeline has LoRAs already.
    """
    tokens = [adapter for adapter in adapters if holds_soft_tokens(adapter.file)]
    with contextlib.ExitStack() as stack:
        for adapter in tokens:
            if adapter.weight not in (0, 1):
                raise InputError(
                    f"soft tokens {adapter.name} have the weight {adapter.weight:g}, but are on or off; give 1 or 0"
                )
            network = denoiser_of(pipeline)[1]
            soft = SoftTokens.load(adapter.file).to(next(network.parameters()).device)
            attached = stack.enter_context(soft.attach(network))
            if not adapter.weight:
                attached.remove()
        stack.enter_context(_loras_applied(pipeline, [adapter for adapter in adapters if adapter not in tokens]))
        yield


@contextlib.contextmanager
def _loras_applied(pipeline: DiffusionPipeline, adapters: Sequence[Adapter]) -> Iterator[None]:
    if not adapters:
        yield
        return
    parts = _adaptable_parts(pipeline)
    present = sorted({name for part in parts.values() for name in getattr(part, "peft_config", {})})
    if present:
        raise InputError(
            f"the pipeline already has adapters ({', '.join(present)}); remove them with "
            "pipeline.unload_lora_weights(), or leave out adapter to use them as they are"
        )
    trainable = [(weight, weight.requires_grad) for part in parts.values() for weight in part.parameters()]
    try:
        active = {}
        with quiet_diffusers():
            for number, adapter in enumerate(adapters):
                _load_in_full(pipeline, adapter, f"adapter_{number}")
                if adapter.weight:
                    active[f"adapter_{number}"] = adapter.weight
            if active:
                pipeline.set_adapters(list(active), list(active.values()))
            else:
                pipeline.unload_lora_weights()
        yield
    finally:
        pipeline.unload_lora_weights()
        for weight, wanted in trainable:
            weight.requires_grad_(wanted)


def find_adapters(
    adapter: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None, weight: float | Sequence[float] = 1.0
) -> list[Adapter]:
    """None, one or several of `find_adapter`, with one weight for all or one each.

    Raises:
        InputError: as `find_adapter`; or weights that are no finite numbers, or not as many as adapters.
        ModelUnavailableError: as `find_adapter`.
    """
    names = [] if adapter is None else [adapter] if isinstance(adapter, (str, os.PathLike)) else list(adapter)
    if isinstance(weight, Sequence | np.ndarray) and not isinstance(weight, str):
        weights = list(weight)
    elif names or weight == 1:
        weights = [weight] * len(names)
    else:
        raise InputError(f"adapter_weight is {weight!r}, but there is no adapter; give one, or leave the weight out")
    if len(weights) != len(names):
        raise InputError(f"{len(weights)} adapter weights for {len(names)} adapters; give one, or one each")
    for one in weights:
        in_range("adapter_weight", one)
    return [find_adapter(name, float(one)) for name, one in zip(names, weights, strict=True)]


def find_adapter(adapter: str | os.PathLike[str], weight: float = 1.0) -> Adapter:
    """The .safetensors file that is meant.

    Args:
        adapter: a file; a folder with pytorch_lora_weights.safetensors or with only one .safetensors file; the run
            folder of a training; or a hub id, ORG/REPO or ORG/REPO/FILE.safetensors.
        weight: see `Adapter`.

    Raises:
        InputError: there is no such file, several could be meant, or it is a pickle.
        ModelUnavailableError: it is on the hub and cannot be fetched.
    """
    path = Path(adapter)
    if path.is_dir():
        names = sorted(entry.name for entry in path.glob("*.safetensors"))
        if not names and (path / "export").is_dir():  # of a training run
            path /= "export"
            names = sorted(entry.name for entry in path.glob("*.safetensors"))
        return Adapter(os.fspath(adapter), path / _only_file(names, str(path)), weight)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise InputError(f"adapter {path} is no .safetensors file; pickles are not read, as they can run code")
        return Adapter(os.fspath(adapter), path, weight)
    name = os.fspath(adapter)
    if path.is_absolute() or name.startswith(".") or "/" not in name or (path.suffix and name.count("/") == 1):
        raise InputError(
            f"adapter {name!r} does not exist; give a .safetensors file, a folder that has one, or a hub id"
        )
    return Adapter(name, _fetch(name), weight)


def adapter_family(shapes: Mapping[str, Sequence[int]]) -> str | None:
    """The family that a LoRA's tensor names, or else the width of its text, point to; `None` where they do not tell.

    Args:
        shapes: shape of each tensor by name.
    """
    names = "\n".join(shapes).replace("_", ".")
    if re.search(r"single\.(transformer\.)?blocks|double\.blocks", names):
        return "flux"
    if re.search(r"joint\.blocks|(^|\n)transformer\.transformer\.blocks", names):
        return "sd3"
    if re.search(r"lora\.te2\.|text\.encoder\.2\.|(input|output)\.blocks\.\d+\.1\.|transformer\.blocks\.[1-9]", names):
        return "sdxl"
    if re.search(r"down\.blocks\.0\.attentions|up\.blocks\.3\.attentions", names):
        return "sd15"
    for name, shape in shapes.items():
        if re.search(r"attn2[._]to[._][kv]", name) and _DOWN.search(name) and len(shape) > 1:
            return {768: "sd15", 2048: "sdxl"}.get(shape[1])
    return None


def _load_in_full(pipeline: DiffusionPipeline, adapter: Adapter, name: str) -> None:
    shapes = _shapes(adapter.file)
    if any("dora_scale" in key for key in shapes):
        raise InputError(
            f"adapter {adapter.name} is a DoRA in kohya's format, whose magnitudes diffusers leaves out; "
            "give the file in diffusers format (pytorch_lora_weights.safetensors)"
        )
    part, denoiser = denoiser_of(pipeline)
    options = {"unet_config": denoiser.config} if part == "unet" else {}
    try:
        wanted = pipeline.lora_state_dict(str(adapter.file), **options)
        wanted = wanted[0] if isinstance(wanted, tuple) else wanted
        pipeline.load_lora_weights(str(adapter.file), adapter_name=name)
    except Exception as error:
        raise InputError(_misfit(pipeline, adapter, shapes, f"cannot be applied ({reason_of(error)})")) from None
    left = _left_over(pipeline, list(wanted), name)
    if left:
        first = ", ".join(left[:3]) + (" ..." if len(left) > 3 else "")
        raise InputError(_misfit(pipeline, adapter, shapes, f"has {len(left)} tensors that fit nothing: {first}"))


def _left_over(pipeline: DiffusionPipeline, keys: list[str], name: str) -> list[str]:
    """Keys of a converted file that did not end up in a layer; where only their number tells, those of that part."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    parts = _adaptable_parts(pipeline)
    left = [key for key in keys if key.split(".")[0] not in parts]
    for part, module in parts.items():
        layers = {
            path
            for path, layer in module.named_modules()
            if isinstance(layer, BaseTunerLayer) and name in {*layer.lora_A, *layer.lora_embedding_A}
        }
        own = [key for key in keys if key.split(".")[0] == part]
        matrices = Counter("down" if _DOWN.search(key) else "up" for key in own if _DOWN.search(key) or _UP.search(key))
        if matrices["down"] != len(layers) or matrices["up"] != len(layers):
            strange = [key for key in own if not any(f"{part}.{layer}." in key for layer in layers)]
            left += strange or own
    if not keys:
        return ["(the file is empty)"]
    return left


def _misfit(pipeline: DiffusionPipeline, adapter: Adapter, shapes: Mapping[str, Sequence[int]], what: str) -> str:
    family, own = adapter_family(shapes), pipeline_family(pipeline)
    if not any("lora" in key for key in shapes):
        return f"adapter {adapter.name} {what}; it holds no LoRA; give one"
    if family is None or family == own:
        return f"adapter {adapter.name} {what}; give a LoRA that was made for this {own} model"
    return (
        f"adapter {adapter.name} seems to be made for {family} and this model is {own}; give the model it was made for"
    )


def _adaptable_parts(pipeline: DiffusionPipeline) -> dict[str, nn.Module]:
    parts = {name: getattr(pipeline, name, None) for name in pipeline._lora_loadable_modules}
    return {name: part for name, part in parts.items() if part is not None}


def _shapes(file: Path) -> dict[str, list[int]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            return {key: opened.get_slice(key).get_shape() for key in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(f"adapter {file} is damaged ({reason_of(error)}); copy or download it again") from None


def _only_file(names: Sequence[str], where: str) -> str:
    if "pytorch_lora_weights.safetensors" in names:
        return "pytorch_lora_weights.safetensors"
    if len(names) != 1:
        found = f"several: {', '.join(names[:4])}" if names else "none"
        raise InputError(f"adapter {where} should have one .safetensors file and has {found}; give the file itself")
    return names[0]


def _fetch(name: str) -> Path:
    from huggingface_hub import hf_hub_download, list_repo_files

    organisation, repository, *rest = name.split("/")
    repo_id = f"{organisation}/{repository}"
    try:
        if rest:
            return Path(hf_hub_download(repo_id, "/".join(rest)))
        with contextlib.suppress(FileNotFoundError):  # offline, the usual name can still be in the cache
            return Path(hf_hub_download(repo_id, "pytorch_lora_weights.safetensors", local_files_only=True))
        names = [file for file in list_repo_files(repo_id) if file.endswith(".safetensors")]
        return Path(hf_hub_download(repo_id, _only_file(names, repo_id)))
    except InputError:
        raise
    except Exception as error:
        raise unavailable(
            name, error, what="adapter", remedy="give a .safetensors file", error_class=ModelUnavailableError
        ) from None
