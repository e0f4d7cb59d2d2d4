"""Adapters are applied in full or refused, and leave no trace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from generation import generate, tiny_pipeline
from generation.adapters import adapter_family, adapters_applied, find_adapter
from mmalign.errors import InputError, ModelUnavailableError

ATTENTION = ["to_q", "to_v"]


def trained(module: Any, targets: list[str], seed: int = 0, dora: bool = False) -> dict[str, torch.Tensor]:
    """The state of an adapter of rank 2 with weights that matter."""
    module.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets, use_dora=dora))
    state = get_peft_model_state_dict(module)
    generator = torch.Generator().manual_seed(seed)
    return {name: tensor + 0.3 * torch.randn(tensor.shape, generator=generator) for name, tensor in state.items()}


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For UNet and first text encoder, in diffusers format."""
    pipeline, folder = tiny_pipeline(), tmp_path_factory.mktemp("lora")
    layers = trained(pipeline.unet, ATTENTION)
    text = trained(pipeline.text_encoder, ["q_proj", "v_proj"])
    pipeline.save_lora_weights(folder, unet_lora_layers=layers, text_encoder_lora_layers=text)
    return folder / "pytorch_lora_weights.safetensors"


def image(pipeline: Any, **options: Any) -> np.ndarray:
    (drawn,) = generate("a dog", model=pipeline, seed=1, steps=2, **options)
    return np.asarray(drawn.image, dtype=np.int16)


def merged(lora: Path, weight: float) -> Any:
    """A pipeline with the adapter added to its weights by hand: W + weight * up @ down."""
    pipeline, state = tiny_pipeline(), load_file(lora)
    for name in state:
        if name.endswith(".lora_A.weight"):
            part, path = name.removesuffix(".lora_A.weight").split(".", 1)
            layer = getattr(pipeline, part).get_submodule(path)
            up = state[name.replace("lora_A", "lora_B")]
            layer.weight.data += weight * up @ state[name]
    return pipeline


@pytest.mark.parametrize("weight", [1.0, 0.5, -0.25])
def test_weight_of_an_adapter(tiny_sdxl: Any, lora: Path, weight: float) -> None:
    plain, wanted = image(tiny_sdxl), image(merged(lora, weight))
    assert np.abs(wanted - plain).mean() > 1
    np.testing.assert_allclose(image(tiny_sdxl, adapter=lora, adapter_weight=weight), wanted, atol=1)


def test_weight_zero_is_no_adapter(tiny_sdxl: Any, lora: Path) -> None:
    np.testing.assert_array_equal(image(tiny_sdxl, adapter=lora, adapter_weight=0), image(tiny_sdxl))


def test_weight_zero_of_a_dora_is_no_adapter(tiny_sdxl: Any, tmp_path: Path) -> None:
    other = tiny_pipeline()
    other.save_lora_weights(tmp_path, unet_lora_layers=trained(other.unet, ATTENTION, dora=True))
    assert np.abs(image(tiny_sdxl, adapter=tmp_path) - image(tiny_sdxl)).mean() > 1
    np.testing.assert_array_equal(image(tiny_sdxl, adapter=tmp_path, adapter_weight=0), image(tiny_sdxl))


def test_several_adapters_add_up(tiny_sdxl: Any, lora: Path, tmp_path: Path) -> None:
    other = tiny_pipeline()
    other.save_lora_weights(tmp_path, unet_lora_layers=trained(other.unet, ["to_v"], seed=1))
    both = image(tiny_sdxl, adapter=[lora, tmp_path], adapter_weight=[0.5, 0.0])
    np.testing.assert_array_equal(both, image(tiny_sdxl, adapter=lora, adapter_weight=0.5))
    both = image(tiny_sdxl, adapter=[lora, tmp_path], adapter_weight=[0.5, 0.8])
    by_hand = merged(lora, 0.5)
    for name, down in load_file(tmp_path / "pytorch_lora_weights.safetensors").items():
        if name.endswith("lora_A.weight"):
            up = load_file(tmp_path / "pytorch_lora_weights.safetensors")[name.replace("lora_A", "lora_B")]
            path = name.removeprefix("unet.").removesuffix(".lora_A.weight")
            by_hand.unet.get_submodule(path).weight.data += 0.8 * up @ down
    np.testing.assert_allclose(both, image(by_hand), atol=1)


def test_kohya_format(tiny_sdxl: Any, lora: Path, tmp_path: Path) -> None:
    kohya = {}
    for name, tensor in load_file(lora).items():
        if name.startswith("unet."):
            path, _, kind = name.removeprefix("unet.").rpartition(".lora_")
            stem = f"lora_unet_{path.replace('.', '_')}"
            kohya[f"{stem}.lora_{'down' if kind[0] == 'A' else 'up'}.weight"] = tensor
            kohya[f"{stem}.alpha"] = torch.tensor(1.0)  # half the rank: half the strength
    save_file(kohya, tmp_path / "kohya.safetensors")
    only_unet = {name: tensor for name, tensor in load_file(lora).items() if name.startswith("unet.")}
    save_file(only_unet, tmp_path / "unet.safetensors")
    wanted = image(tiny_sdxl, adapter=tmp_path / "unet.safetensors", adapter_weight=0.5)
    assert np.abs(wanted - image(tiny_sdxl)).mean() > 1
    np.testing.assert_allclose(image(tiny_sdxl, adapter=tmp_path / "kohya.safetensors"), wanted, atol=1)


def test_the_settings_name_adapter_content_and_weight(tiny_sdxl: Any, lora: Path) -> None:
    import hashlib

    (drawn,) = generate("a", model=tiny_sdxl, adapter=lora.parent, adapter_weight=0.5, steps=1)
    digest = hashlib.sha256(lora.read_bytes()).hexdigest()
    assert drawn.settings["adapters"] == [{"adapter": str(lora.parent), "sha256": digest, "weight": 0.5}]


# -- no trace ----------------------------------------------------------------------------------------------------------


def trace(pipeline: Any) -> list[Any]:
    parts = [pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2]
    modules = [(name, type(module), id(module)) for part in parts for name, module in part.named_modules()]
    weights = [
        (name, weight.data_ptr(), weight.requires_grad) for part in parts for name, weight in part.named_parameters()
    ]
    return [modules, weights, pipeline.get_list_adapters(), [hasattr(part, "peft_config") for part in parts]]


def test_the_pipeline_is_left_as_it_was(tiny_sdxl: Any, lora: Path) -> None:
    before, plain = trace(tiny_sdxl), image(tiny_sdxl)
    image(tiny_sdxl, adapter=lora)
    assert trace(tiny_sdxl) == before
    with pytest.raises(KeyboardInterrupt), adapters_applied(tiny_sdxl, [find_adapter(lora)]):
        raise KeyboardInterrupt
    assert trace(tiny_sdxl) == before
    np.testing.assert_array_equal(image(tiny_sdxl), plain)


def test_adapters_of_the_caller_are_not_touched(lora: Path) -> None:
    pipeline = tiny_pipeline()
    pipeline.load_lora_weights(str(lora), adapter_name="mine")
    with_mine = image(pipeline)
    with pytest.raises(InputError, match=r"already has adapters \(mine\)"):
        image(pipeline, adapter=lora)
    np.testing.assert_array_equal(image(pipeline), with_mine)


# -- refused -----------------------------------------------------------------------------------------------------------


def without(name: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda state: {key: value for key, value in state.items() if name not in key}


def with_prefix(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda state: {key.replace(old, new): value for key, value in state.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_prefix("unet.", "transformer."), "fit nothing: transformer.down_blocks"),
        (with_prefix("unet.mid_block.", "unet.middle."), "fit nothing: unet.middle"),
        (with_prefix("text_encoder.", "text_encoder_9."), "fit nothing: text_encoder_9"),
        (with_prefix("attn2.to_v", "attn3.to_v"), "fit nothing: .*attn3.to_v"),
        (without("mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_B"), "fit nothing"),
        (
            lambda state: {
                key: value[:, :3].clone() if "to_v.lora_A" in key else value for key, value in state.items()
            },
            "size",
        ),
        (lambda state: {"lora_unet_mid_block_to_q.dora_scale": torch.ones(1)}, "DoRA in kohya's format"),
        (lambda state: {"something.weight": torch.ones(1)}, "it holds no LoRA"),
        (lambda state: {}, "cannot be applied|fit nothing"),
    ],
)
def test_what_does_not_fit_is_refused(
    tiny_sdxl: Any, lora: Path, tmp_path: Path, change: Callable[..., Any], message: str
) -> None:
    before = trace(tiny_sdxl)
    save_file(change(load_file(lora)), tmp_path / "changed.safetensors")
    with pytest.raises(InputError, match=message) as raised:
        image(tiny_sdxl, adapter=tmp_path)
    assert "\n" not in str(raised.value)
    assert trace(tiny_sdxl) == before


def test_the_family_it_was_made_for_is_named(tiny_sdxl: Any, tmp_path: Path) -> None:
    for family, part in {"sd15": "unet", "sd3": "transformer", "flux": "transformer"}.items():
        other = tiny_pipeline(family)
        layers = {f"{part}_lora_layers": trained(getattr(other, part), ["to_q", "to_k", "to_v"])}
        other.save_lora_weights(tmp_path / family, **layers)
        own = tiny_pipeline(family)
        changed = image(own, adapter=tmp_path / family, height=64, width=64)
        assert np.abs(changed - image(own, height=64, width=64)).mean() > 1
        with pytest.raises(InputError, match=f"seems to be made for {family} and this model is sdxl"):
            image(tiny_sdxl, adapter=tmp_path / family)


def test_families_by_name_and_width(lora: Path) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(lora).items()}
    assert adapter_family(shapes) == "sdxl"
    kohya = "lora_unet_{}.lora_down.weight"
    assert adapter_family({kohya.format("input_blocks_4_1_transformer_blocks_0_attn1_to_q"): (4, 640)}) == "sdxl"
    assert (
        adapter_family({kohya.format("down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"): (4, 320)}) == "sd15"
    )
    assert adapter_family({kohya.format("double_blocks_3_img_attn_qkv"): (4, 3072)}) == "flux"
    assert adapter_family({kohya.format("joint_blocks_3_x_block_attn_qkv"): (4, 1536)}) == "sd3"
    one = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight"
    assert [adapter_family({one: (4, width)}) for width in (768, 2048, 99)] == ["sd15", "sdxl", None]


def test_files_folders_and_hub_ids(lora: Path, tmp_path: Path) -> None:
    assert find_adapter(lora).file == find_adapter(lora.parent).file == find_adapter(str(lora)).file == lora
    folder = tmp_path / "several"
    folder.mkdir()
    with pytest.raises(InputError, match="has none"):
        find_adapter(folder)
    (tmp_path / "run" / "export").mkdir(parents=True)
    with pytest.raises(InputError, match="has none"):
        find_adapter(tmp_path / "run")
    (tmp_path / "run" / "export" / "pytorch_lora_weights.safetensors").touch()
    found = find_adapter(tmp_path / "run")  # what a training run exported
    assert found.file == tmp_path / "run" / "export" / "pytorch_lora_weights.safetensors"
    assert found.name == str(tmp_path / "run")
    (folder / "b.safetensors").touch()
    assert find_adapter(folder).file.name == "b.safetensors"
    (folder / "a.safetensors").touch()
    with pytest.raises(InputError, match=r"several: a\.safetensors, b\.safetensors"):
        find_adapter(folder)
    (folder / "c.pt").touch()
    with pytest.raises(InputError, match="pickles are not read"):
        find_adapter(folder / "c.pt")
    for absent in ("lora.safetensors", "/x/y", "./x", "runs/lora.safetensors"):
        with pytest.raises(InputError, match="does not exist"):
            find_adapter(absent)
    for name in ("someone/some-lora", "someone/some-lora/file.safetensors"):
        with pytest.raises(ModelUnavailableError, match="HF_HUB_OFFLINE is set"):
            find_adapter(name)


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_weights_are_numbers(tiny_sdxl: Any, lora: Path, weight: float) -> None:
    with pytest.raises(InputError, match=r"adapter_weight is .*; give a finite number"):
        generate("a", model=tiny_sdxl, adapter=lora, adapter_weight=weight)


def test_damaged_file(tiny_sdxl: Any, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(InputError, match="is damaged"):
        image(tiny_sdxl, adapter=tmp_path)
