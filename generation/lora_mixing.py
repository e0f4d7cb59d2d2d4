"""LoRA files mixed into one whose update is the weighted sum of theirs.

An update B A is linear in neither factor alone. Mixing in weight space, sum_i w_i B_i A_i, is what the weights of
several loaded adapters do in diffusers, and what `mix_adapters` puts into one file: with weights 1 - t and t the update
goes straight from one adapter to the other, and with one weight from the base model to the adapter, so that a reward
traded for likeness to the base can be chosen after training. AlignProp's code (arXiv 2310.03739) mixes the factors
instead, which adds cross terms, and squares the weight where one adapter is mixed with the base model.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.checks import at_least
from mmalign.errors import InputError, reason_of
from mmalign.files import save_tensors, whole_file

from .adapters import Adapter, adapter_family, find_adapters
from .pipelines import quiet_diffusers

__all__ = ["Factors", "MixedAdapter", "factor_space_mix", "mix_adapters", "weight_space_mix"]

_PARTS = ("unet.", "transformer.", "text_encoder.", "text_encoder_2.", "text_encoder_3.")
_DENOISERS = ("unet", "transformer")
_DORA = re.compile(r"dora_scale|lora_magnitude_vector")
_LAYER = re.compile(r"(.+)\.lora_(A|B)\.weight")


class Factors(NamedTuple):
    """One layer's update B A; of a convolution, the height and width of its kernel follow in A, and 1 and 1 in B."""

    a: Float[Tensor, "rank in *kernel"]
    b: Float[Tensor, "out rank *ones"]


def weight_space_mix(adapters: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float]) -> Factors:
    """Factors whose product is sum_i w_i B_i A_i: those of all adapters side by side, each B times its weight.

    Args:
        adapters: (A, B) of one layer, `rank in` and `out rank`, each of its own rank; scales folded in.
        weights: one for each. For one adapter and the base model, its share alone.
    """
    down = torch.cat([a for a, _ in adapters])
    return Factors(down, torch.cat([w * b for (_, b), w in zip(adapters, weights, strict=True)], dim=1))


def factor_space_mix(adapters: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float]) -> Factors:
    """(sum_i w_i A_i, sum_i w_i B_i) as AlignProp's code mixes, for parity: its product is not linear in the weights.

    Args:
        adapters: (A, B) of one layer, all of one rank.
        weights: one for each.

    Raises:
        InputError: the ranks differ.
    """
    ranks = {len(a) for a, _ in adapters}
    if len(ranks) > 1:
        raise InputError(f"factors of ranks {sorted(ranks)} cannot be added; mix in weight space")
    pairs = list(zip(adapters, weights, strict=True))
    return Factors(sum(w * a for (a, _), w in pairs), sum(w * b for (_, b), w in pairs))  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class MixedAdapter:
    """What `mix_adapters` wrote.

    Attributes:
        file: where.
        adapters: what went into it.
        layers: how many layers it updates.
        rank: the largest, by part of the pipeline.
        error: ||mix - sum|| / ||sum|| in the Frobenius norm over all layers, where it was cut to a rank; else 0.
        worst_layer: where that is largest for one layer; `None` where nothing was cut.
        worst_error: how large.
    """

    file: Path
    adapters: tuple[Adapter, ...]
    layers: int
    rank: dict[str, int]
    error: float
    worst_layer: str | None
    worst_error: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe; adapters by their content."""
        return {
            "file": str(self.file),
            "adapters": [adapter.to_dict() for adapter in self.adapters],
            "layers": self.layers,
            "rank": self.rank,
            "error": self.error,
            "worst_layer": self.worst_layer,
            "worst_error": self.worst_error,
        }


def mix_adapters(
    adapters: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    weights: float | Sequence[float],
    out: str | os.PathLike[str],
    *,
    rank: int | None = None,
) -> MixedAdapter:
    """Write one LoRA file in diffusers format that does what several do together, each with its weight.

    Alphas and rsLoRA's scale are folded in, so that every tool reads it alike. Each layer has the sum of the ranks;
    what fewer adapters update is padded with zeros, as tools disagree on layers of different ranks. Float32.

    Args:
        adapters: what `generate(adapter=...)` takes: files of this library, of diffusers or of kohya's tools, folders,
            runs of a training, or hub ids.
        weights: one for all or one each; 1 is what an adapter was trained for. Those of weight 0 are left out.
        out: a .safetensors file, replaced if it exists.
        rank: cut every layer to this rank, by its singular values; the error is reported.

    Raises:
        InputError: an adapter cannot be found or read, is a DoRA or no LoRA, or is of another model than the first; a
            weight is no number, or none is above 0; or `out` cannot be written.
        ModelUnavailableError: an adapter is on the hub and cannot be fetched.
    """
    at_least("rank", rank)
    target = Path(out)
    if target.suffix != ".safetensors":
        raise InputError(f"out is {str(target)!r}; give a path that ends in .safetensors")
    found = find_adapters(adapters, weights)
    if any(adapter.file.resolve() == target.resolve() for adapter in found):
        raise InputError(f"out {str(target)!r} is one of the adapters, which would be lost; give another file")
    used = [adapter for adapter in found if adapter.weight]
    if not used:
        raise InputError("no adapter has a weight other than 0, so that there is nothing to mix; give one a weight")
    files = [_read(adapter) for adapter in used]
    _check_same_model(used, files)
    mixed: dict[str, Factors] = {}
    lost: dict[str, tuple[float, float]] = {}  # squared norms, of what was cut off and of all
    for layer in sorted({layer for file in files for layer in file}):
        having = [(file[layer], adapter.weight) for file, adapter in zip(files, used, strict=True) if layer in file]
        mixed[layer] = weight_space_mix([factors for factors, _ in having], [weight for _, weight in having])
        if rank is not None:
            mixed[layer], *squares = _cut(mixed[layer], rank)
            lost[layer] = squares[0], squares[1]
    ranks: dict[str, int] = {}
    for layer, factors in mixed.items():
        part = layer.partition(".")[0]
        ranks[part] = max(ranks.get(part, 0), len(factors.a))
    tensors = {}
    for layer, factors in mixed.items():
        down, up = _padded(factors, ranks[layer.partition(".")[0]])
        tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"] = down.float(), up.float()
    about = {"format": "pt", "mixed_from": json.dumps([adapter.to_dict() for adapter in found])}
    with whole_file(target, remedy="give another file or free some space") as unfinished:
        save_tensors(tensors, unfinished, about)
    total = sum(square for _, square in lost.values())
    errors = {layer: (cut / square) ** 0.5 if square else 0.0 for layer, (cut, square) in lost.items()}
    worst = max(errors, key=errors.__getitem__, default=None)
    return MixedAdapter(
        target,
        tuple(found),
        len(mixed),
        ranks,
        (sum(cut for cut, _ in lost.values()) / total) ** 0.5 if total else 0.0,
        worst,
        errors[worst] if worst else 0.0,
    )


def _cut(factors: Factors, rank: int) -> tuple[Factors, float, float]:
    """The best approximation of a rank; the squared norms of what is lost and of all."""
    a, b = factors.a.flatten(1).double(), factors.b.flatten(1).double()
    left, upper = torch.linalg.qr(b)
    right, lower = torch.linalg.qr(a.T)
    u, s, vh = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    kept = s[:rank].sqrt()
    down, up = (vh[:rank] * kept[:, None]) @ right.T, left @ (u[:, :rank] * kept)
    shaped = Factors(down.reshape(-1, *factors.a.shape[1:]), up.reshape(len(up), -1, *factors.b.shape[2:]))
    return shaped, float((s[rank:] ** 2).sum()), float((s**2).sum())


def _padded(factors: Factors, rank: int) -> Factors:
    missing = rank - len(factors.a)
    if not missing:
        return factors
    down, up = factors
    return Factors(
        torch.cat([down, down.new_zeros(missing, *down.shape[1:])]),
        torch.cat([up, up.new_zeros(len(up), missing, *up.shape[2:])], dim=1),
    )


def _check_same_model(adapters: Sequence[Adapter], files: Sequence[Mapping[str, Factors]]) -> None:
    by_denoiser = {
        part: next((i for i, file in enumerate(files) if part in _parts_of(file)), None) for part in _DENOISERS
    }
    if None not in by_denoiser.values():
        said = " and ".join(f"{adapters[i].name} for a {part}" for part, i in by_denoiser.items() if i is not None)
        raise InputError(f"the adapters are of different models, {said}; mix adapters of one model")
    known: dict[str, tuple[str, str]] = {}
    for adapter, file in zip(adapters, files, strict=True):
        for layer, (a, b) in file.items():
            shape = f"{'x'.join(map(str, a.shape[1:]))} to {len(b)}"
            wanted, first = known.setdefault(layer, (shape, adapter.name))
            if wanted != shape:
                raise InputError(
                    f"adapter {adapter.name} updates {layer} from {shape} and {first} from {wanted}; mix adapters of "
                    "one model"
                )


def _parts_of(layers: Mapping[str, Any]) -> set[str]:
    return {layer.partition(".")[0] for layer in layers}


def _read(adapter: Adapter) -> dict[str, Factors]:
    """Each layer's factors by diffusers' name for it, the scale in B; float32 or more."""
    state, header = _load(adapter)
    dora = next((key for key in state if _DORA.search(key)), None)
    if dora is not None:
        raise InputError(
            f"adapter {adapter.name} is a DoRA ({dora}): it gives every row of the changed weight a learnt length, so "
            "that its change is no product of two factors, and a weighted sum is no DoRA; apply it alone"
        )
    state = _with_alphas_folded(adapter, state)
    if not all(key.startswith(_PARTS) for key in state):
        state = _converted(adapter, state)
    state = _peft_names(adapter, state)
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        match = _LAYER.fullmatch(key)
        if match is None or tensor.ndim < 2:
            raise InputError(
                f"adapter {adapter.name} has {key}, which is no factor of a LoRA; only linear layers and convolutions "
                "with lora_A and lora_B can be mixed"
            )
        halves.setdefault(match[1], {})[match[2]] = tensor
    files = {}
    for layer, both in halves.items():
        if len(both) < 2 or len(both["A"]) != both["B"].shape[1]:
            raise InputError(f"adapter {adapter.name} is damaged (the factors of {layer} do not fit); copy it again")
        files[layer] = Factors(both["A"], both["B"] * _scale(layer, len(both["A"]), header))
    if not files:
        raise InputError(f"adapter {adapter.name} holds no LoRA; give one")
    return files


def _load(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Finite float32 tensors, and peft's configuration of every part where the file says it."""
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(adapter.file, "pt") as file:
            state = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
            header = json.loads((file.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise InputError(f"adapter {adapter.file} is damaged ({reason_of(error)}); copy or download it again") from None
    for key, tensor in state.items():
        if not tensor.isfinite().all():
            raise InputError(f"adapter {adapter.name}: {key} holds values that are not finite; take another one")
    return state, header


def _scale(layer: str, rank: int, header: Mapping[str, Any]) -> float:
    """Of an update B A in diffusers format: 1 where the file says nothing."""
    from peft.utils.other import get_pattern_key

    part, _, path = layer.partition(".")
    if f"{part}.lora_alpha" not in header:
        return 1.0
    patterns = header.get(f"{part}.alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(list(patterns), path), header[f"{part}.lora_alpha"])
    return float(alpha) / (rank**0.5 if header.get(f"{part}.use_rslora") else rank)


def _with_alphas_folded(adapter: Adapter, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Multiply the second factor of every layer by its alpha / rank, and leave the alpha out."""
    folded = {key: tensor for key, tensor in state.items() if not key.endswith(".alpha")}
    for key, alpha in state.items():
        if not key.endswith(".alpha"):
            continue
        layer = key.removesuffix("alpha")
        names = [name for name in folded if name.startswith(layer)]
        down = next((name for name in names if re.search(r"lora_(down|A)\.|lora\.down\.", name)), None)
        up = next((name for name in names if re.search(r"lora_(up|B)\.|lora\.up\.", name)), None)
        if down is None or up is None or alpha.numel() != 1:
            raise InputError(f"adapter {adapter.name} is damaged ({key} belongs to no layer); copy it again")
        folded[up] = folded[up] * (float(alpha) / len(folded[down]))
    return folded


def _converted(adapter: Adapter, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Another tool's names as diffusers'."""
    from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin

    family = adapter_family({key: list(tensor.shape) for key, tensor in state.items()})
    loader, options = {
        "sdxl": (StableDiffusionXLLoraLoaderMixin, {"unet_config": SimpleNamespace(layers_per_block=2)}),
        "sd15": (StableDiffusionXLLoraLoaderMixin, {}),
        "flux": (FluxLoraLoaderMixin, {}),
    }.get(family or "", (None, {}))
    try:
        if loader is None:
            raise ValueError("its model is not known by its layers' names")
        with quiet_diffusers():
            found = loader.lora_state_dict(state, **options)
    except Exception as error:
        raise InputError(
            f"adapter {adapter.name} is in a format that cannot be read ({reason_of(error)}); convert it to diffusers' "
            "(pytorch_lora_weights.safetensors)"
        ) from None
    return dict(found[0] if isinstance(found, tuple) else found)


def _peft_names(adapter: Adapter, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Layers by their dotted names and factors as lora_A and lora_B, whichever version of diffusers wrote them."""
    from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    named: dict[str, Tensor] = {}
    for part in sorted(_parts_of(state)):
        own = {key.removeprefix(f"{part}."): value for key, value in state.items() if key.startswith(f"{part}.")}
        if part.startswith("text_encoder"):
            own = convert_state_dict_to_peft(convert_state_dict_to_diffusers(own))
            # The older name of CLIP's layers, which newer versions of diffusers read as well.
            own = {key if not key.startswith("encoder.layers.") else f"text_model.{key}": own[key] for key in own}
        elif not any("lora_A" in key for key in own):
            own = convert_unet_state_dict_to_peft(own)
        named.update({f"{part}.{key}": value for key, value in own.items()})
    return named
