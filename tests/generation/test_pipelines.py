"""Pipelines from every place they come from, and what is said where one cannot be had."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file

from generation import load_pipeline
from generation.pipelines import _bit_sums, denoiser_of, guess_family, pipeline_family, weights_fingerprint
from generation.tiny import TINY_FAMILIES
from mmalign.errors import InputError, ModelUnavailableError


def draw(pipeline: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(4)
    options = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "np"}
    return pipeline(prompt="a cat", generator=generator, **options).images


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_saved_and_loaded_again(family: str, tmp_path: Path) -> None:
    made = load_pipeline(f"tiny:{family}", device="cpu")
    assert pipeline_family(made) == family
    made.save_pretrained(tmp_path / "pipeline")
    loaded = load_pipeline(tmp_path / "pipeline", device="cpu")
    assert pipeline_family(loaded) == family
    np.testing.assert_allclose(draw(loaded), draw(made), atol=1e-4)


def test_loaded_pipeline_is_passed_through(tiny_sdxl: Any) -> None:
    assert load_pipeline(tiny_sdxl) is tiny_sdxl
    with pytest.raises(InputError, match=r"pipeline\.to"):
        load_pipeline(tiny_sdxl, device="cpu")


@pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_dtype_of_all_parts(tiny_sdxl_folder: Path, dtype: str, expected: torch.dtype) -> None:
    for model in ("tiny:sdxl", tiny_sdxl_folder):
        loaded = load_pipeline(model, device="cpu", dtype=dtype)
        assert {loaded.unet.dtype, loaded.vae.dtype, loaded.text_encoder_2.dtype} == {expected}


def test_half_precision_sdxl_decodes_in_float32(tiny_sdxl_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_sdxl_folder, tmp_path / "pipeline")
    config = json.loads((folder / "vae" / "config.json").read_text())
    (folder / "vae" / "config.json").write_text(json.dumps(config | {"force_upcast": False}))
    seen = []

    def decoded_in(pipeline: Any) -> torch.dtype:
        pipeline.vae.decoder.register_forward_pre_hook(lambda module, _: seen.append(module.conv_in.weight.dtype))
        assert np.isfinite(draw(pipeline)).all()
        return seen[-1]

    assert decoded_in(load_pipeline(folder, device="cpu", dtype="float16")) == torch.float32
    own = load_pipeline(folder, device="cpu", dtype="float16", vae=folder / "vae")
    assert decoded_in(own) == torch.float16, "a VAE that the caller names is used as it says itself"


def test_another_vae(tiny_sdxl_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_sdxl_folder / "vae", tmp_path / "other")
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    save_file({name: tensor * 0 for name, tensor in weights.items()}, folder / "diffusion_pytorch_model.safetensors")
    for model in ("tiny:sdxl", tiny_sdxl_folder):
        loaded = load_pipeline(model, device="cpu", vae=folder)
        assert not any(weight.any() for weight in loaded.vae.parameters())
        assert any(weight.any() for weight in loaded.unet.parameters())
    with pytest.raises(InputError, match="AutoencoderKL"):
        load_pipeline("tiny:sdxl", device="cpu", vae=tiny_sdxl_folder / "tokenizer")


def test_variant(tiny_sdxl: Any, tmp_path: Path) -> None:
    tiny_sdxl.save_pretrained(tmp_path, variant="fp16")
    np.testing.assert_allclose(draw(load_pipeline(tmp_path, device="cpu", variant="fp16")), draw(tiny_sdxl), atol=1e-4)
    with pytest.raises(InputError, match="no weights of variant 'ema'"):
        load_pipeline(tmp_path, device="cpu", variant="ema")


@pytest.mark.parametrize(("family", "part"), [("sdxl", "unet"), ("sd3", "transformer"), ("flux", "transformer")])
def test_denoiser(family: str, part: str) -> None:
    pipeline = load_pipeline(f"tiny:{family}", device="cpu")
    assert denoiser_of(pipeline) == (part, getattr(pipeline, part))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_fingerprint_is_of_values_precision_and_order(dtype: torch.dtype) -> None:
    def of(*values: list[float]) -> str:
        weights = [torch.nn.Parameter(torch.tensor(value).to(dtype)) for value in values]
        return weights_fingerprint(torch.nn.ParameterList(weights))

    first = [1.0, -2.0, 0.5, 3.0]
    assert of(first, [1.0]) == of(first, [1.0])
    several = [first, [-2.0, 1.0, 0.5, 3.0], [2 * value for value in first], [-value for value in first], [0.0] * 4]
    assert len({of(values, [1.0]) for values in several} | {of([1.0], first), of(first)}) == 7
    module = torch.nn.Linear(3, 4).to(dtype)
    before = weights_fingerprint(module)
    assert weights_fingerprint(copy.deepcopy(module)) == before != weights_fingerprint(module.double())


def test_fingerprint_of_large_tensors_is_exact_and_counts_places() -> None:
    values = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    bits = values.numpy().view(np.int32).astype(np.int64)
    with np.errstate(over="ignore"):
        wanted = [bits.sum(), (bits * bits).sum(), (bits * np.arange(bits.size)).sum()]
    assert _bit_sums(values) == [int(value) for value in wanted]
    swapped = values.clone()
    swapped[[5, 5 + (1 << 16)]] = values[[5 + (1 << 16), 5]]
    assert _bit_sums(swapped)[:2] == _bit_sums(values)[:2]
    assert _bit_sums(swapped) != _bit_sums(values)
    assert _bit_sums(values.view(2, 4, 100, 250).to(memory_format=torch.channels_last)) == _bit_sums(values)


def test_guessed_family(tiny_sdxl_folder: Path, tmp_path: Path, original_weights: dict[str, torch.Tensor]) -> None:
    known = {
        "tiny:flux": "flux",
        "tiny:sd3": "sd3",
        "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
        "stabilityai/sdxl-turbo": "sdxl",
        "stabilityai/sd-turbo": "sd15",
        "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
        "stabilityai/stable-diffusion-2-1": "sd15",
        "stabilityai/stable-diffusion-3.5-medium": "sd3",
        "stabilityai/stable-diffusion-3-medium-diffusers": "sd3",
        "black-forest-labs/FLUX.1-dev": "flux",
        "someone/a-model": "sdxl",
    }
    assert {name: guess_family(name) for name in known} == known
    folder = shutil.copytree(tiny_sdxl_folder, tmp_path / "flux")
    assert guess_family(folder) == "sdxl", "what it is counts, not its name"
    (folder / "model_index.json").write_text("[]")
    assert guess_family(folder) == "flux"
    save_file(original_weights, tmp_path / "sdxl.safetensors")
    assert guess_family(tmp_path / "sdxl.safetensors") == "sd15"


# -- one file ----------------------------------------------------------------------------------------------------------

_RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0"}
_RESNET |= {"conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
_TOP = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
_TOP |= {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def renamed(name: str, names: dict[str, str]) -> str:
    """`name` with the first part that `names` has replaced."""
    return next((name.replace(old, new) for old, new in names.items() if old in name), name)


def unet_name(name: str) -> str:
    """The name in CompVis' code, for four resolutions of two layers."""
    if found := re.fullmatch(r"(down|up)_blocks\.(\d)\.(resnets|attentions)\.(\d)\.(.*)", name):
        way, block, kind, layer, rest = found.groups()
        number = 3 * int(block) + int(layer) + (way == "down")
        place = f"{'input' if way == 'down' else 'output'}_blocks.{number}.{int(kind == 'attentions')}."
        return place + (renamed(rest, _RESNET) if kind == "resnets" else rest)
    if found := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name):
        kind, layer, rest = found.groups()
        if kind == "attentions":
            return f"middle_block.1.{rest}"
        return f"middle_block.{2 * int(layer)}.{renamed(rest, _RESNET)}"
    if found := re.fullmatch(r"down_blocks\.(\d)\.downsamplers\.0\.conv\.(.*)", name):
        return f"input_blocks.{3 * int(found[1]) + 3}.0.op.{found[2]}"
    if found := re.fullmatch(r"up_blocks\.(\d)\.upsamplers\.0\.conv\.(.*)", name):
        return f"output_blocks.{3 * int(found[1]) + 2}.{1 if found[1] == '0' else 2}.conv.{found[2]}"
    return renamed(name, _TOP)


def vae_name(name: str) -> str:
    name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets", lambda found: f"up.{3 - int(found[1])}.block", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda found: f"up.{3 - int(found[1])}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    if "mid_block.attentions.0" in name:
        name = renamed(name.replace("mid_block.attentions.0", "mid.attn_1"), _ATTENTION)
    return name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")


@pytest.fixture(scope="module")
def original_weights(tiny_sd15: Any) -> dict[str, torch.Tensor]:
    """The tiny SD 1.5 as its authors would have saved it."""
    weights = {}
    for name, tensor in tiny_sd15.unet.state_dict().items():
        weights["model.diffusion_model." + unet_name(name)] = tensor.clone()
    for name, tensor in tiny_sd15.vae.state_dict().items():
        square = "attentions" in name and tensor.ndim == 2
        weights["first_stage_model." + vae_name(name)] = (tensor[:, :, None, None] if square else tensor).clone()
    for name, tensor in tiny_sd15.text_encoder.state_dict().items():
        weights["cond_stage_model.transformer.text_model." + name.removeprefix("text_model.")] = tensor.clone()
    return weights


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_single_file(
    original_weights: dict[str, torch.Tensor],
    tiny_sd15: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    suffix: str,
) -> None:
    from diffusers.loaders import single_file_utils

    tiny_sd15.save_pretrained(tmp_path / "configuration")
    known = {"pretrained_model_name_or_path": str(tmp_path / "configuration")}
    monkeypatch.setitem(single_file_utils.DIFFUSERS_DEFAULT_PIPELINE_PATHS, "v1", known)
    file = tmp_path / f"model{suffix}"
    if suffix == ".ckpt":
        torch.save({"state_dict": original_weights}, file)
    else:
        save_file(original_weights, file)
    loaded = load_pipeline(file, device="cpu")
    assert pipeline_family(loaded) == "sd15"
    np.testing.assert_allclose(draw(loaded), draw(tiny_sd15), atol=1e-4)


def test_single_file_needs_its_configuration_from_the_hub(
    original_weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    save_file(original_weights, tmp_path / "model.safetensors")
    with pytest.raises(ModelUnavailableError, match=r"configuration of model.safetensors.*HF_HUB_OFFLINE is set"):
        load_pipeline(tmp_path / "model.safetensors", device="cpu")


def test_files_that_are_no_model(tmp_path: Path, tiny_sdxl_folder: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"weight": Trap()}, tmp_path / "trap.ckpt")
    save_file({"unet.mid_block.to_q.lora_A.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0")
    (tmp_path / "notes.txt").write_text("hello")
    wrong = {
        "trap.ckpt": "could run code",
        "lora.safetensors": "is an adapter",
        "cut.safetensors": "damaged",
        "notes.txt": r"\.safetensors or \.ckpt",
        "absent.safetensors": "does not exist",
    }
    for name, message in wrong.items():
        with pytest.raises(InputError, match=message) as raised:
            load_pipeline(tmp_path / name, device="cpu")
        assert "\n" not in str(raised.value)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(InputError, match=r"model_index\.json"):
        load_pipeline(tiny_sdxl_folder / "unet" / "diffusion_pytorch_model.safetensors", device="cpu")


# -- what is not there -------------------------------------------------------------------------------------------------


def test_folders_that_are_no_pipeline(tiny_sdxl_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no model_index\.json"):
        load_pipeline(tmp_path, device="cpu")
    save_file({"a": torch.zeros(1)}, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(InputError, match="give it as adapter"):
        load_pipeline(tmp_path, device="cpu")

    folder = shutil.copytree(tiny_sdxl_folder, tmp_path / "pipeline")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"short")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_pipeline(folder, device="cpu")
    shutil.rmtree(folder / "tokenizer_2")
    with pytest.raises(InputError, match="lacks tokenizer_2/"):
        load_pipeline(folder, device="cpu")
    layout = json.loads((folder / "model_index.json").read_text()) | {"_class_name": "DiTPipeline"}
    (folder / "model_index.json").write_text(json.dumps(layout))
    with pytest.raises(InputError, match="DiTPipeline, which is not supported"):
        load_pipeline(folder, device="cpu")
    (folder / "model_index.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        load_pipeline(folder, device="cpu")


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ("stabilityai/stable-diffusion-xl-base-1.0", ModelUnavailableError, "HF_HUB_OFFLINE is set"),
        ("sdxl", InputError, "tiny:sdxl"),
        ("tiny:sd4", InputError, "sdxl, sd15, sd3, flux"),
        ("./nowhere", InputError, "does not exist"),
        ("/no/such/folder", InputError, "does not exist"),
    ],
)
def test_names_that_lead_nowhere(model: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as raised:
        load_pipeline(model, device="cpu")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("cause", "error", "message"),
    [
        (GatedRepoError, ModelUnavailableError, "terms of use.*hf auth login"),
        (RepositoryNotFoundError, InputError, "on the hub.*check the name"),
        (ConnectionError, ModelUnavailableError, r"nor fetched \(.*no route.*\).*HF_HOME"),
    ],
)
def test_what_the_hub_says(
    cause: type[Exception], error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers wraps the hub's exceptions in an OSError of many lines."""

    def fail(*_: object, **__: object) -> None:
        try:
            raise cause.__new__(cause, "no route")  # the hub's own ask for a response
        except Exception as first:
            raise OSError("no route\nto what\nwas asked for") from first

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", fail)
    with pytest.raises(error, match=f"model 'some/model' .*{message}") as raised:
        load_pipeline("some/model", device="cpu")
    assert "\n" not in str(raised.value)


def test_other_pipelines_are_refused(tiny_sdxl: Any) -> None:
    from diffusers import StableDiffusionXLImg2ImgPipeline

    with pytest.raises(InputError, match="StableDiffusionXLImg2ImgPipeline is not supported"):
        pipeline_family(StableDiffusionXLImg2ImgPipeline(**tiny_sdxl.components))
