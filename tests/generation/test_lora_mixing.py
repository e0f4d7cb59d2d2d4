"""One LoRA file that does what several do together: by the numbers in the weights, and by what is drawn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from generation import tiny_pipeline
from generation.adapters import adapters_applied, find_adapters
from generation.export import DIFFUSERS_FILE, export_lora
from generation.lora import add_lora, load_lora_state, lora_state
from generation.lora_mixing import factor_space_mix, mix_adapters, weight_space_mix
from mmalign.errors import InputError

ATTENTION = ["to_q", "to_v"]


def shaken(state: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator) for name, tensor in state.items()}


def of_diffusers(folder: Path, seed: int, rank: int = 2, targets: Sequence[str] = ATTENTION, **config: Any) -> Path:
    """As diffusers saves: UNet and first text encoder."""
    pipeline, states = tiny_pipeline(), []
    for module, names in ((pipeline.unet, targets), (pipeline.text_encoder, ["q_proj"])):
        module.add_adapter(LoraConfig(r=rank, target_modules=list(names), **{"lora_alpha": rank, **config}))
        states.append(shaken(get_peft_model_state_dict(module), seed))
    pipeline.save_lora_weights(folder, unet_lora_layers=states[0], text_encoder_lora_layers=states[1])
    return folder / DIFFUSERS_FILE


def of_ours(folder: Path, seed: int, **options: Any) -> dict[str, Path]:
    """As a training exports: in diffusers' format and in kohya's."""
    pipeline = tiny_pipeline()
    add_lora(pipeline.unet, **{"rank": 3, "alpha": 7.0, **options})
    load_lora_state(pipeline.unet, shaken(lora_state(pipeline.unet), seed))
    return export_lora(pipeline.unet, folder, name="kohya")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of different ranks, alphas, layers, parts and formats."""
    folder = tmp_path_factory.mktemp("adapters")
    ours, other = of_ours(folder / "ours", 2), of_ours(folder / "rs", 3, rslora=True, targets=["to_k", "to_v"])
    return {
        "plain": of_diffusers(folder / "plain", 0),
        "wide": of_diffusers(folder / "wide", 1, rank=5, targets=["to_v", "conv1", "proj_in"]),
        "ours": ours["diffusers"],
        "kohya": ours["kohya"],
        "rslora": other["diffusers"],
        "rslora-kohya": other["kohya"],
    }


def changed_weights(pipeline: Any, adapters: Any, weights: Any) -> dict[str, Tensor]:
    """What diffusers and peft add to each weight."""
    with adapters_applied(pipeline, find_adapters(adapters, weights)):
        return {
            f"{part}.{name}": sum(
                layer.get_delta_weight(adapter) for adapter in layer.active_adapters if adapter in layer.lora_A
            ).detach()
            for part in ("unet", "text_encoder", "text_encoder_2")
            for name, layer in getattr(pipeline, part).named_modules()
            if isinstance(layer, LoraLayer)
        }


def latents(adapters: Any, weights: Any) -> Tensor:
    """Drawn in float64, so that no rounding but that of the files shows."""
    pipeline = tiny_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    with adapters_applied(pipeline, find_adapters(adapters, weights)):
        pipeline.to(torch.float64)
        noise = torch.Generator().manual_seed(3)
        return pipeline("a dog", num_inference_steps=1, generator=noise, output_type="latent").images


def test_weights_of_loaded_adapters_are_linear_in_the_update(tiny_sdxl: Any, files: dict[str, Path]) -> None:
    names = ["plain", "wide", "rslora"]
    alone = [changed_weights(tiny_sdxl, files[name], 1.0) for name in names]
    weights = [0.3, 0.7, -0.5]
    together = changed_weights(tiny_sdxl, [files[name] for name in names], weights)
    assert set(together) == {layer for one in alone for layer in one}
    for layer, change in together.items():
        wanted = sum(w * one[layer] for w, one in zip(weights, alone, strict=True) if layer in one)
        torch.testing.assert_close(change, wanted)


def test_the_mixed_file_draws_the_same(tiny_sdxl: Any, files: dict[str, Path], tmp_path: Path) -> None:
    sources, weights = [files["ours"], files["rslora-kohya"], files["wide"]], [0.5, -0.25, 1.0]
    mixed = mix_adapters(sources, weights, tmp_path / "mixed.safetensors")
    wanted = changed_weights(tiny_sdxl, sources, weights)
    found = changed_weights(tiny_sdxl, mixed.file, 1.0)
    assert set(found) == set(wanted)
    assert mixed.layers == len(wanted)
    for layer, change in wanted.items():
        torch.testing.assert_close(found[layer], change, atol=1e-5, rtol=1e-5)
    drawn, plain = latents(mixed.file, 1.0), latents([], 1.0)
    assert (latents(sources, weights) - drawn).abs().max() < 1e-5
    assert (drawn - plain).abs().mean() > 1e-2
    assert (mixed.error, mixed.worst_layer) == (0.0, None)


def updates(file: Path) -> dict[str, Tensor]:
    """B A of each layer of a mixed file."""
    state = load_file(file)
    return {
        name.removesuffix(".lora_A.weight"): state[name.replace("lora_A", "lora_B")].flatten(1) @ down.flatten(1)
        for name, down in state.items()
        if name.endswith("lora_A.weight")
    }


def test_kohyas_files_are_the_same_adapters(files: dict[str, Path], tmp_path: Path) -> None:
    ours = mix_adapters([files["ours"], files["rslora"]], [0.3, 0.7], tmp_path / "ours.safetensors")
    kohya = mix_adapters([files["kohya"], files["rslora-kohya"]], [0.3, 0.7], tmp_path / "kohya.safetensors")
    wanted, found = updates(ours.file), updates(kohya.file)
    assert found.keys() == wanted.keys()
    for layer, change in wanted.items():
        torch.testing.assert_close(found[layer], change, atol=1e-6, rtol=1e-5)
        assert change.abs().max() > 1e-2


def test_every_layer_has_one_rank_and_no_alpha(files: dict[str, Path], tmp_path: Path) -> None:
    mixed = mix_adapters([files["plain"], files["wide"]], 1.0, tmp_path / "mixed.safetensors")
    state = load_file(mixed.file)
    ranks = {name.partition(".")[0]: len(tensor) for name, tensor in state.items() if "lora_A" in name}
    assert ranks == mixed.rank == {"unet": 7, "text_encoder": 7}
    assert {tensor.shape[1] for name, tensor in state.items() if "lora_B" in name} == {7}
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert {name.rpartition(".lora_")[2] for name in state} == {"A.weight", "B.weight"}
    assert any(tensor.ndim == 4 and tensor.shape[2:] == (3, 3) for tensor in state.values())
    with safe_open(mixed.file, "pt") as file:
        about = json.loads(file.metadata()["mixed_from"])
    assert about == mixed.to_dict()["adapters"]
    assert [row["weight"] for row in about] == [1.0, 1.0]
    again = mix_adapters([files["plain"], files["wide"]], 1.0, tmp_path / "again.safetensors")
    assert again.file.read_bytes() == mixed.file.read_bytes()


def test_weight_zero_leaves_an_adapter_out(files: dict[str, Path], tmp_path: Path) -> None:
    mixed = mix_adapters([files["plain"], files["wide"]], [1.0, 0.0], tmp_path / "mixed.safetensors")
    assert mixed.rank == {"unet": 2, "text_encoder": 2}
    with pytest.raises(InputError, match="nothing to mix"):
        mix_adapters([files["plain"]], 0.0, tmp_path / "none.safetensors")


def test_cut_to_a_rank(files: dict[str, Path], tmp_path: Path) -> None:
    sources, weights = [files["plain"], files["wide"]], [0.8, 0.5]
    wanted = updates(mix_adapters(sources, weights, tmp_path / "whole.safetensors").file)
    errors = []
    for rank in (1, 3, 7):
        mixed = mix_adapters(sources, weights, tmp_path / "cut.safetensors", rank=rank)
        assert mixed.rank == {"unet": rank, "text_encoder": rank}
        found = updates(mixed.file)
        lost = {layer: found[layer] - wanted[layer] for layer in wanted}
        best = {  # Eckart-Young
            layer: float(torch.linalg.svdvals(change)[rank:].norm() / change.norm()) for layer, change in wanted.items()
        }
        for layer, change in lost.items():
            assert float(change.norm() / wanted[layer].norm()) == pytest.approx(best[layer], abs=1e-5)
        everything = [torch.cat([x.flatten() for x in those.values()]).norm() for those in (lost, wanted)]
        assert mixed.error == pytest.approx(float(everything[0] / everything[1]), abs=1e-5)
        assert mixed.worst_error == pytest.approx(max(best.values()), abs=1e-5)
        assert best[str(mixed.worst_layer)] == pytest.approx(mixed.worst_error, abs=1e-5)
        errors.append(mixed.error)
    assert errors[0] > errors[1] > 0.01
    assert errors[2] < 1e-6


def test_older_names_of_layers_and_halves_are_known(tiny_sdxl: Any, files: dict[str, Path], tmp_path: Path) -> None:
    state = load_file(files["plain"])
    unet = {key: value for key, value in state.items() if key.startswith("unet.")}
    text = {key: value for key, value in state.items() if key.startswith("text_encoder.")}
    older = {
        key.replace("lora_A.weight", "lora.down.weight").replace("lora_B.weight", "lora.up.weight"): value.bfloat16()
        for key, value in unet.items()
    } | {
        key.replace("lora_A", "lora_linear_layer.down").replace("lora_B", "lora_linear_layer.up"): value
        for key, value in text.items()
    }
    save_file(older, tmp_path / "older.safetensors")
    mixed = mix_adapters([tmp_path / "older.safetensors", files["plain"]], [0.5, 0.5], tmp_path / "m.safetensors")
    assert mixed.layers == len(state) // 2
    found, wanted = (changed_weights(tiny_sdxl, file, 1.0) for file in (mixed.file, files["plain"]))
    for layer, change in wanted.items():
        torch.testing.assert_close(found[layer], change, atol=2e-2, rtol=2e-2)  # bfloat16
    assert found.keys() == wanted.keys()


@pytest.mark.parametrize("family", ["sd15", "sd3", "flux"])
def test_other_families(family: str, tmp_path: Path) -> None:
    pipeline, part = tiny_pipeline(family), "unet" if family == "sd15" else "transformer"
    module = getattr(pipeline, part)
    module.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k"]))
    pipeline.save_lora_weights(tmp_path, **{f"{part}_lora_layers": shaken(get_peft_model_state_dict(module), 0)})
    mixed = mix_adapters([tmp_path, tmp_path], [0.25, 0.5], tmp_path / "mixed.safetensors")
    own, found = tiny_pipeline(family), []
    for file, weight in ((tmp_path / DIFFUSERS_FILE, 0.75), (mixed.file, 1.0)):
        with adapters_applied(own, find_adapters(file, weight)):
            layers = [layer for layer in getattr(own, part).modules() if isinstance(layer, LoraLayer)]
            found.append([layer.get_delta_weight(layer.active_adapters[0]).clone() for layer in layers])
    assert len(found[0]) == mixed.layers > 0
    torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=1e-5)


def test_factors_are_mixed_as_written() -> None:
    rng = np.random.default_rng(0)
    pairs = [tuple(torch.from_numpy(rng.normal(size=shape)) for shape in ((2, 4), (3, 2))) for _ in range(2)]
    a, b = factor_space_mix(pairs, [0.3, 0.7])  # type: ignore[arg-type]
    cross = 0.3 * 0.7 * (pairs[0][1] @ pairs[1][0] + pairs[1][1] @ pairs[0][0])
    torch.testing.assert_close(b @ a, 0.09 * pairs[0][1] @ pairs[0][0] + 0.49 * pairs[1][1] @ pairs[1][0] + cross)
    wide = (torch.ones(3, 4).double(), torch.ones(3, 3).double())
    a, b = weight_space_mix([pairs[0], wide], [2.0, -1.0])  # type: ignore[list-item]
    assert len(a) == 5
    torch.testing.assert_close(b @ a, 2 * pairs[0][1] @ pairs[0][0] - wide[1] @ wide[0])
    with pytest.raises(InputError, match=r"ranks \[2, 3\] cannot be added"):
        factor_space_mix([pairs[0], wide], [0.5, 0.5])  # type: ignore[list-item]


def test_what_cannot_be_mixed(files: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"

    def refused(state: dict[str, Tensor], message: str) -> None:
        save_file(state, tmp_path / "odd.safetensors")
        with pytest.raises(InputError, match=message) as raised:
            mix_adapters([files["plain"], tmp_path / "odd.safetensors"], 0.5, out)
        assert "\n" not in str(raised.value)

    state = load_file(files["plain"])
    key = next(name for name in state if name.startswith("unet.") and "to_v.lora_A" in name)
    dora = of_ours(tmp_path / "dora", 0, dora=True)["diffusers"]
    refused(load_file(dora), r"is a DoRA .*no product of two factors")
    refused({"lora_unet_mid_block_to_q.dora_scale": torch.ones(3)}, "is a DoRA")
    refused({**state, key: torch.ones(2, 3)}, "mix adapters of one model")
    refused({**state, key: torch.ones(3, state[key].shape[1])}, r"factors of .*to_v do not fit")
    refused({name: value for name, value in state.items() if name != key}, r"factors of .*to_v do not fit")
    refused({**state, key: state[key] * np.nan}, "not finite")
    refused({**state, "unet.conv_in.diff": torch.ones(3)}, r"unet\.conv_in\.diff, which is no factor of a LoRA")
    other = {f"transformer.x.to_q.lora_{half}.weight": torch.ones(2, 2) for half in "AB"}
    refused(other, "for a unet and .* for a transformer")
    refused({"something.weight": torch.ones(3, 3)}, "cannot be read")
    refused({}, "holds no LoRA")
    (tmp_path / "cut.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(InputError, match="is damaged"):
        mix_adapters([tmp_path / "cut.safetensors"], 1.0, out)
    with pytest.raises(InputError, match=r"ends in \.safetensors"):
        mix_adapters([files["plain"]], 1.0, tmp_path / "out.pt")
    with pytest.raises(InputError, match="rank is 0"):
        mix_adapters([files["plain"]], 1.0, out, rank=0)
    with pytest.raises(InputError, match="2 adapter weights for 1 adapters"):
        mix_adapters([files["plain"]], [1.0, 2.0], out)
    assert not out.exists()


def test_an_adapter_is_not_written_over_by_its_mix(files: dict[str, Path], tmp_path: Path) -> None:
    own = tmp_path / "own.safetensors"
    own.write_bytes(next(iter(files.values())).read_bytes())
    before = own.read_bytes()
    with pytest.raises(InputError, match="is one of the adapters"):
        mix_adapters(own, 0.5, own)
    assert own.read_bytes() == before
