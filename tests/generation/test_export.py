"""Exported adapters, loaded by diffusers and merged by hand, give the trained model's own output."""

from __future__ import annotations

import copy
import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from generation.export import export_formats, export_lora
from generation.kohya import original_block_name
from generation.lora import add_lora, load_lora_state, lora_state
from generation.tiny import tiny_pipeline
from mmalign.errors import InputError

# SDXL's attention stacks in diffusers and in the original checkpoint, and their transformer blocks.
STACKS = [
    ("down_blocks.1.attentions.0", "input_blocks.4.1", 2),
    ("down_blocks.1.attentions.1", "input_blocks.5.1", 2),
    ("down_blocks.2.attentions.0", "input_blocks.7.1", 10),
    ("down_blocks.2.attentions.1", "input_blocks.8.1", 10),
    ("mid_block.attentions.0", "middle_block.1", 10),
    ("up_blocks.0.attentions.0", "output_blocks.0.1", 10),
    ("up_blocks.0.attentions.1", "output_blocks.1.1", 10),
    ("up_blocks.0.attentions.2", "output_blocks.2.1", 10),
    ("up_blocks.1.attentions.0", "output_blocks.3.1", 2),
    ("up_blocks.1.attentions.1", "output_blocks.4.1", 2),
    ("up_blocks.1.attentions.2", "output_blocks.5.1", 2),
]
VARIANTS: dict[str, dict[str, Any]] = {
    "alpha = rank": {"rank": 4},
    "alpha != rank": {"rank": 4, "alpha": 3},
    "rslora": {"rank": 6, "alpha": 2, "rslora": True},
    "dora": {"rank": 4, "alpha": 3, "dora": True},
}


@pytest.fixture(scope="module")
def untouched() -> Any:
    return tiny_pipeline("sdxl")


@pytest.fixture
def pipeline(untouched: Any) -> Iterator[Any]:
    """Loads adapters; what was loaded is dropped afterwards."""
    yield untouched
    untouched.unload_lora_weights()


def trained(unet: nn.Module, seed: int = 1, **options: Any) -> nn.Module:
    """A copy with an adapter of random values."""
    unet = copy.deepcopy(unet)
    add_lora(unet, seed=0, **options)
    generator = torch.Generator().manual_seed(seed)
    state = lora_state(unet)
    for key, value in state.items():
        noise = torch.randn(value.shape, generator=generator)
        state[key] = value * (1 + 0.3 * noise) if "magnitude" in key else 0.3 * noise
    load_lora_state(unet, state)
    return unet


def forward(unet: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    config = unet.config
    conditions = {}
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        times = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)
        conditions = {"text_embeds": torch.randn(2, pooled, generator=generator), "time_ids": times}
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    prompts = torch.randn(2, 77, config.cross_attention_dim, generator=generator)
    with torch.no_grad():
        return unet(latents, torch.tensor([10, 900]), prompts, added_cond_kwargs=conditions).sample


@pytest.mark.parametrize("variant", VARIANTS)
def test_diffusers_loads_the_trained_model_exactly(pipeline: Any, variant: str, tmp_path: Path) -> None:
    unet = trained(pipeline.unet, **VARIANTS[variant])
    plain = forward(pipeline.unet)
    pipeline.load_lora_weights(export_lora(unet, tmp_path)["diffusers"])
    output = forward(pipeline.unet)
    assert torch.equal(output, forward(unet))
    assert (output - plain).abs().max() > 0.01


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant != "dora"])
def test_diffusers_loads_the_kohya_file(pipeline: Any, variant: str, tmp_path: Path) -> None:
    unet = trained(pipeline.unet, **VARIANTS[variant])
    pipeline.load_lora_weights(export_lora(unet, tmp_path)["kohya"])
    if variant == "rslora":  # alpha * sqrt(rank) is rounded to float32
        torch.testing.assert_close(forward(pipeline.unet), forward(unet), rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(forward(pipeline.unet), forward(unet))


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant != "dora"])
def test_kohya_file_merged_by_hand(untouched: Any, variant: str, tmp_path: Path) -> None:
    """W + alpha / rank * up @ down, as kohya's tools and ComfyUI compute it, found by the table of names above."""
    unet = trained(untouched.unet, **VARIANTS[variant])
    merged, tensors = copy.deepcopy(untouched.unet), load_file(export_lora(unet, tmp_path)["kohya"])
    for theirs, original, _ in STACKS:
        for number, block in enumerate(merged.get_submodule(theirs).transformer_blocks):
            for attention in ("attn1", "attn2"):
                layers = block.get_submodule(attention)
                for name, layer in [("to_q", layers.to_q), ("to_k", layers.to_k), ("to_v", layers.to_v),
                                    ("to_out_0", layers.to_out[0])]:  # fmt: skip
                    flat = f"lora_unet_{original.replace('.', '_')}_transformer_blocks_{number}_{attention}_{name}"
                    down, up = tensors.pop(f"{flat}.lora_down.weight"), tensors.pop(f"{flat}.lora_up.weight")
                    layer.weight.data += tensors.pop(f"{flat}.alpha").item() / down.shape[0] * (up @ down)
    assert not tensors
    torch.testing.assert_close(forward(merged), forward(unet), rtol=1e-4, atol=1e-5)


def test_key_sets_are_those_of_the_full_model(tmp_path: Path) -> None:
    unet = tiny_pipeline("sdxl", deep=True).unet
    add_lora(unet, rank=1, seed=0)
    paths = export_lora(unet, tmp_path)
    layers = [
        (f".transformer_blocks.{block}.{attention}.{layer}", theirs, original)
        for theirs, original, blocks in STACKS
        for block in range(blocks)
        for attention in ("attn1", "attn2")
        for layer in ("to_q", "to_k", "to_v", "to_out.0")
    ]
    assert len(layers) == 560
    assert set(load_file(paths["diffusers"])) == {
        f"unet.{theirs}{rest}.lora_{side}.weight" for rest, theirs, _ in layers for side in "AB"
    }
    assert set(load_file(paths["kohya"])) == {
        f"lora_unet_{(original + rest).replace('.', '_')}.{part}"
        for rest, _, original in layers
        for part in ("lora_down.weight", "lora_up.weight", "alpha")
    }


def test_original_block_names() -> None:
    for theirs, original, _ in STACKS:
        for rest in ("proj_in", "proj_out", "transformer_blocks.1.ff.net.0.proj"):
            assert original_block_name(f"{theirs}.{rest}") == f"{original}.{rest}"
            assert original_block_name(f"{theirs}.{rest}", "sd15") == f"{theirs}.{rest}"
    with pytest.raises(InputError, match="'conv_in' has no place"):
        original_block_name("conv_in")
    with pytest.raises(InputError, match="not 'flux'"):
        original_block_name("mid_block.attentions.0.proj_in", "flux")


def test_other_layers_of_the_attention_blocks(pipeline: Any, tmp_path: Path) -> None:
    targets = ("to_q", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
    unet = trained(pipeline.unet, rank=2, alpha=1, targets=targets)
    for path in export_lora(unet, tmp_path).values():
        pipeline.load_lora_weights(path)
        assert torch.equal(forward(pipeline.unet), forward(unet))
        pipeline.unload_lora_weights()


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_sd15(format: str, tmp_path: Path) -> None:
    pipeline = tiny_pipeline("sd15")
    unet = trained(pipeline.unet, rank=4, alpha=3)
    path = export_lora(unet, tmp_path, formats=[format])[format]
    if format == "kohya":
        names = {key.partition(".")[0] for key in load_file(path)}
        assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q" in names
    pipeline.load_lora_weights(path)
    assert torch.equal(forward(pipeline.unet), forward(unet))


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_transformers_go_to_diffusers_alone(family: str, tmp_path: Path) -> None:
    pipeline = tiny_pipeline(family)
    transformer = trained(pipeline.transformer, rank=2, alpha=3)
    paths = export_lora(transformer, tmp_path)
    assert list(paths) == ["diffusers"]
    pipeline.load_lora_weights(paths["diffusers"])
    loaded = {key.replace(".default_0", ""): value for key, value in pipeline.transformer.state_dict().items()}
    state = {key.replace(".default", ""): value for key, value in transformer.state_dict().items()}
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], state[key]) for key in state)
    scales = {module.scaling["default_0"] for module in pipeline.transformer.modules() if hasattr(module, "scaling")}
    assert scales == {1.5}


def test_dora_has_no_kohya_file(untouched: Any, tmp_path: Path) -> None:
    unet = trained(untouched.unet, **VARIANTS["dora"])
    assert export_formats(unet) == ("diffusers",)
    assert list(export_lora(unet, tmp_path)) == ["diffusers"]
    with pytest.raises(InputError, match="DoRA adapter cannot be written in kohya's format"):
        export_lora(unet, tmp_path / "new", formats=["diffusers", "kohya"])
    assert not (tmp_path / "new").exists()


def test_headers(untouched: Any, tmp_path: Path) -> None:
    unet = trained(untouched.unet, rank=16, alpha=2, rslora=True)
    notes = {"mmalign.method": "mapo", "ss_network_dim": "wrong"}
    paths = export_lora(unet, tmp_path, name="cats", metadata=notes)
    assert [path.name for path in paths.values()] == ["pytorch_lora_weights.safetensors", "cats.safetensors"]
    headers = {}
    for format, path in paths.items():
        with safe_open(path, "pt") as file:
            headers[format] = file.metadata()
        assert headers[format]["mmalign.method"] == "mapo"
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
    kohya = headers["kohya"]
    assert (kohya["ss_network_dim"], kohya["ss_network_alpha"]) == ("16", "8.0")  # 2 * sqrt(16)
    assert kohya["ss_base_model_version"] == "sdxl_base_v1-0"
    assert kohya["ss_network_module"] == "networks.lora"
    assert kohya["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert {value.item() for key, value in load_file(paths["kohya"]).items() if key.endswith(".alpha")} == {8.0}
    config = json.loads(headers["diffusers"]["lora_adapter_metadata"])
    assert (config["unet.r"], config["unet.lora_alpha"], config["unet.use_rslora"]) == (16, 2, True)


def test_an_export_that_fails_leaves_the_earlier_one(
    untouched: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = trained(untouched.unet, rank=2)
    before = {path: path.read_bytes() for path in export_lora(unet, tmp_path).values()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    load_lora_state(unet, {key: value + 1 for key, value in lora_state(unet).items()})
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(InputError, match=r"cannot be written .*No space left"):
            export_lora(unet, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    export_lora(unet, tmp_path)
    assert all(path.read_bytes() != content for path, content in before.items())
    assert set(tmp_path.iterdir()) == set(before)
    with pytest.raises(InputError, match="cannot be written"):
        export_lora(unet, next(iter(before)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"formats": ["a1111"]}, "formats must be some of diffusers, kohya"),
        ({"formats": []}, "formats must be some of"),
        ({"name": "a/b"}, "name must be a file's name"),
        ({"name": ""}, "name must be a file's name"),
        ({"name": "pytorch_lora_weights"}, "name must be a file's name"),
        ({"metadata": {"step": 3}}, "metadata must be text by text, not 'step': 3"),
    ],
)
def test_refusals(adapted: nn.Module, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        export_lora(adapted, tmp_path, **options)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def adapted(untouched: Any) -> nn.Module:
    return trained(untouched.unet, rank=1)


def test_weights_that_are_not_finite(adapted: nn.Module, untouched: Any, tmp_path: Path) -> None:
    kept = lora_state(adapted)
    key = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.weight"
    load_lora_state(adapted, {**kept, key: torch.full_like(kept[key], float("nan"))})
    with pytest.raises(InputError, match=f"{key}' holds values that are not finite.*diverged"):
        export_lora(adapted, tmp_path)
    load_lora_state(adapted, kept)
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="no adapter"):
        export_lora(untouched.unet, tmp_path)


def test_a_model_of_no_family(adapted: nn.Module, tmp_path: Path) -> None:
    other = copy.copy(adapted)
    other.__class__ = type("Other", (type(adapted),), {})
    with pytest.raises(InputError, match=r"model is a Other.*give the denoiser of a pipeline"):
        export_lora(other, tmp_path)
