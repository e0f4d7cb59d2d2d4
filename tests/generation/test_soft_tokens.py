"""Soft tokens in diffusers' own models: what blocks see, what is left behind, what files hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from generation import generate, generate_again, tiny_pipeline
from generation.pipelines import denoiser_of
from generation.soft_tokens import SoftTokens, soft_tokens_applied
from mmalign.errors import InputError


def tokens_for(pipeline: Any, *, scale: float = 25.0, **options: Any) -> SoftTokens:
    """Large enough to be seen in a picture."""
    options.setdefault("layers", 2)
    tokens = SoftTokens.initial(denoiser_of(pipeline)[1], torch.Generator().manual_seed(3), **options)
    with torch.no_grad():
        for parameter in tokens.parameters():
            parameter.mul_(scale)
    return tokens


def drawn(pipeline: Any, **options: Any) -> np.ndarray:
    (image,) = generate("a dog", model=pipeline, seed=1, steps=2, guidance_scale=3.0, **options)
    return np.asarray(image.image, dtype=np.int16)


def hooks(network: nn.Module) -> list[tuple[int, int]]:
    return [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in network.modules()]


def inputs(pipeline: Any) -> dict[str, Any]:
    """Arguments of the denoiser for three images at three timesteps."""
    network = denoiser_of(pipeline)[1]
    generator = torch.Generator().manual_seed(0)
    channels, config = network.config.in_channels, network.config
    times = torch.tensor([0, 499, 1000 if type(network).__name__.startswith("SD3") else 999])
    latents = torch.randn(3, channels, 8, 8, generator=generator)
    if type(network).__name__.startswith("SD3"):
        text = torch.randn(3, 7, config.joint_attention_dim, generator=generator)
        pooled = torch.randn(3, config.pooled_projection_dim, generator=generator)
        return {
            "hidden_states": latents,
            "encoder_hidden_states": text,
            "pooled_projections": pooled,
            "timestep": times,
        }
    text = torch.randn(3, 7, config.cross_attention_dim, generator=generator)
    given: dict[str, Any] = {"sample": latents, "timestep": times, "encoder_hidden_states": text}
    if config.addition_embed_type:
        pooled = torch.randn(3, 32, generator=generator)
        given["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": torch.full((3, 6), 64.0)}
    return given


FAMILIES = ["sd3", "sdxl", "sd15"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_network_is_bit_identical_once_tokens_are_removed(family: str) -> None:
    pipeline = tiny_pipeline(family)
    network, given = denoiser_of(pipeline)[1], inputs(pipeline)
    before, state = hooks(network), {name: value.clone() for name, value in network.state_dict().items()}
    with torch.no_grad():
        plain = network(**given).sample
        attached = tokens_for(pipeline).attach(network)
        soft = network(**given).sample
        attached.remove()
        attached.remove()
        again = network(**given).sample
    assert not torch.allclose(soft, plain, atol=1e-3)
    assert torch.equal(again, plain)
    assert hooks(network) == before
    assert network.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    with pytest.raises(KeyboardInterrupt), tokens_for(pipeline).attach(network):
        raise KeyboardInterrupt
    assert hooks(network) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_with_and_without_checkpointing_are_equal_and_every_row_is_alone(family: str) -> None:
    pipeline = tiny_pipeline(family)
    network, given = denoiser_of(pipeline)[1].double(), inputs(pipeline)
    network.requires_grad_(False)
    given = {name: value.double() if isinstance(value, Tensor) else value for name, value in given.items()}
    if "added_cond_kwargs" in given:
        given["added_cond_kwargs"] = {name: value.double() for name, value in given["added_cond_kwargs"].items()}
    gradients = []
    for checkpointing in (False, True):
        tokens = tokens_for(pipeline, time_table=True).double()
        if checkpointing:
            network.train()
            network.enable_gradient_checkpointing()
        with tokens.attach(network):
            out = network(**given).sample
            network(**given | {"timestep": given["timestep"] * 0})  # other timesteps before the backward pass
            out.square().sum().backward()
            rows = [
                network(**{
                    name: {key: one[i : i + 1] for key, one in value.items()} if isinstance(value, dict)
                    else value[i : i + 1]
                    for name, value in given.items()
                }).sample
                for i in range(3)
            ]  # fmt: skip
        torch.testing.assert_close(torch.cat(rows), out)
        assert tokens.time_table is not None
        used = tokens.time_table.grad.abs().sum(1).nonzero()[:, 0].tolist()
        assert used == [0, 49, 99]
        gradients.append([tokens.tokens.grad, tokens.time_table.grad])
    for one, other in zip(*gradients, strict=True):
        assert float(one.abs().max()) > 0
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_an_mmdit_drops_what_its_tokens_became_and_later_blocks_see_plain_text() -> None:
    """A loop over the blocks by hand."""
    pipeline = tiny_pipeline("sd3")
    network, given, tokens = pipeline.transformer, inputs(pipeline), tokens_for(pipeline, layers=1)
    with torch.no_grad():
        with tokens.attach(network):
            found = network(**given).sample
        image = network.pos_embed(given["hidden_states"])
        told = network.time_text_embed(given["timestep"], given["pooled_projections"])
        text = network.context_embedder(given["encoder_hidden_states"])
        soft = tokens.tokens[0] + tokens.time_table[[0, 49, 99]][:, None]
        states, image = network.transformer_blocks[0](image, torch.cat([soft, text], 1), told)
        none, image = network.transformer_blocks[1](image, states[:, 4:], told)
        assert none is None
        image = network.proj_out(network.norm_out(image, told))
        image = image.reshape(3, 4, 4, 2, 2, 16)
        wanted = torch.einsum("nhwpqc->nchpwq", image).reshape(3, 16, 8, 8)
    torch.testing.assert_close(found, wanted)


def test_masked_text_stays_masked(tiny_sd15: Any) -> None:
    network, given, tokens = tiny_sd15.unet, inputs(tiny_sd15), tokens_for(tiny_sd15, stages=["down", "mid", "up"])
    mask = torch.ones(3, 7)
    mask[:, 5:] = 0
    with tokens.attach(network), torch.no_grad():
        masked = network(**given, encoder_attention_mask=mask).sample
        short = network(**given | {"encoder_hidden_states": given["encoder_hidden_states"][:, :5]}).sample
    torch.testing.assert_close(masked, short, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "options", "count"),
    [
        ({"caption_projection_dim": 1536, "num_layers": 24}, {}, 798_720),
        ({"cross_attention_dim": 768}, {}, 79_872),
        ({"cross_attention_dim": 2048, "addition_embed_type": "text_time"}, {}, 8_192),
        ({"cross_attention_dim": 2048, "addition_embed_type": "text_time"}, {"time_table": True}, 8_192 + 204_800),
    ],
)
def test_parameter_counts_of_the_released_tokens(config: dict[str, Any], options: dict[str, Any], count: int) -> None:
    """shared/methods/softrepa.md, section 2."""
    network = nn.Module()
    kind = "SD3Transformer2DModel" if "num_layers" in config else "UNet2DConditionModel"
    network.config = {"_class_name": kind, **config}
    tokens = SoftTokens.initial(network, torch.Generator(), **options)
    assert sum(parameter.numel() for parameter in tokens.parameters()) == count
    assert (
        tokens.stages == ((), ("down",), ("down", "mid"))[["num_layers" in config, count == 79_872, True].index(True)]
    )


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd3", "sd15"])
def test_saved_tokens_draw_the_same_picture_and_come_off(family: str, tmp_path: Path) -> None:
    pipeline = tiny_pipeline(family)
    network = denoiser_of(pipeline)[1]
    plain, tokens = drawn(pipeline), tokens_for(pipeline)
    file = tokens.save(tmp_path / "export" / "soft_tokens.safetensors", {"backbone": family})
    with tokens.attach(network):
        attached = drawn(pipeline)
    assert np.abs(attached - plain).mean() > 0.3
    before = hooks(network)
    for adapter in (file, tmp_path):
        np.testing.assert_array_equal(drawn(pipeline, adapter=adapter), attached)
    np.testing.assert_array_equal(drawn(pipeline, adapter=file, adapter_weight=0), plain)
    np.testing.assert_array_equal(drawn(pipeline), plain)
    assert hooks(network) == before
    (image,) = generate("a dog", model=pipeline, seed=1, steps=2, guidance_scale=3.0, adapter=file)
    np.testing.assert_array_equal(np.asarray(generate_again(image, model=pipeline).image), attached)


def test_tokens_go_together_with_a_lora(tmp_path: Path) -> None:
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipeline, other = tiny_pipeline("sd15"), tiny_pipeline("sd15")
    other.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    state = get_peft_model_state_dict(other.unet)
    other.save_lora_weights(tmp_path / "lora", unet_lora_layers={k: v + 0.3 for k, v in state.items()})
    file, lora = tokens_for(pipeline).save(tmp_path / "soft_tokens.safetensors"), tmp_path / "lora"
    plain, only_lora = drawn(pipeline), drawn(pipeline, adapter=lora)
    both = drawn(pipeline, adapter=[lora, file])
    with soft_tokens_applied(pipeline, file):
        np.testing.assert_array_equal(drawn(pipeline, adapter=lora), both)
    assert np.abs(both - only_lora).mean() > 1
    np.testing.assert_array_equal(drawn(pipeline, adapter=[file, lora], adapter_weight=[0, 1]), only_lora)
    np.testing.assert_array_equal(drawn(pipeline), plain)
    with pytest.raises(InputError, match=r"weight 0\.5, but are on or off"):
        drawn(pipeline, adapter=file, adapter_weight=0.5)


def test_both_branches_of_guidance_get_tokens(tiny_sd15: Any) -> None:
    seen = []
    layer = tiny_sd15.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    handle = layer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    tokens = tokens_for(tiny_sd15, time_table=False)
    with tokens.attach(tiny_sd15.unet):
        drawn(tiny_sd15)
    handle.remove()
    for states in seen:
        assert states.shape[:2] == (2, 81)
        torch.testing.assert_close(states[:, 1:5], tokens.tokens.expand(2, -1, -1))


@pytest.mark.parametrize(("family", "auto"), [("sd3", True), ("sd15", False)])
def test_text_guided_editing(family: str, auto: bool, photos: Path, captions: list[dict[str, Any]]) -> None:
    """Image to image of a photograph by diffusers' own pipelines: with tokens another picture, afterwards as before."""
    from diffusers import AutoPipelineForImage2Image, StableDiffusionImg2ImgPipeline

    pipeline = tiny_pipeline(family)
    kind = AutoPipelineForImage2Image if auto else StableDiffusionImg2ImgPipeline
    editing: Any = kind.from_pipe(pipeline)
    with Image.open(photos / captions[0]["file"]) as opened:
        photo = opened.convert("RGB").resize((64, 64))

    def edit() -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 4, "strength": 0.5, "output_type": "np", "guidance_scale": 3.0}
        return editing("a painting", image=photo, generator=generator, **options).images

    editing.set_progress_bar_config(disable=True)
    plain = edit()
    with soft_tokens_applied(editing, tokens_for(pipeline)) as same:
        assert same is editing
        edited = edit()
    assert np.abs(edited - plain).mean() > 1e-3
    np.testing.assert_array_equal(edit(), plain)


def test_released_layouts_are_read_from_safetensors(tmp_path: Path) -> None:
    layouts = [
        ({"dc_tokens": (5, 4, 1536), "dc_t_tokens.weight": (100, 7680)}, "prepend", 5, ()),
        ({"a": (100, 768), "b": (4, 768)}, "after-bos", 1, ("down",)),
        ({"tokens": (4, 2048)}, "after-bos", 1, ("down", "mid")),
    ]
    for shapes, placement, layers, stages in layouts:
        tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
        save_file(tensors, tmp_path / "tokens.safetensors")
        tokens = SoftTokens.load(tmp_path / "tokens.safetensors")
        assert (tokens.placement, tokens.layers, tokens.count, tokens.stages) == (placement, layers, 4, stages)
        by_rows = sorted(tensors.values(), key=len)
        assert torch.equal(tokens.tokens, by_rows[0])
        assert tokens.time_table is None if len(by_rows) == 1 else torch.equal(tokens.time_table, by_rows[1])


def test_metadata_say_what_a_file_holds(tmp_path: Path, tiny_sdxl: Any) -> None:
    file = tokens_for(tiny_sdxl, count=3, time_table=True).save(tmp_path / "t.safetensors", {"backbone": "sdxl"})
    header = file.read_bytes()[8 : 8 + int.from_bytes(file.read_bytes()[:8], "little")]
    about = json.loads(header)["__metadata__"]
    assert {name: about[name] for name in ("backbone", "placement", "n_layers", "m", "buckets", "stages")} == {
        "backbone": "sdxl", "placement": "after-bos", "n_layers": "1", "m": "3", "buckets": "100", "stages": "down,mid",
    }  # fmt: skip
    again = SoftTokens.load(file)
    assert again.stages == ("down", "mid")


# -- refused -----------------------------------------------------------------------------------------------------------


def test_pickles_are_not_read_and_the_remedy_is_told(tmp_path: Path, tiny_sd15: Any) -> None:
    class Dangerous:
        def __reduce__(self) -> Any:
            return pytest.fail, ("a pickle was read",)

    file = tmp_path / "tokens.pth"
    torch.save({"tokens": Dangerous()}, file)
    with pytest.raises(InputError, match=r"is a pickle.*safetensors\.torch\.save_file"):
        SoftTokens.load(file)
    with pytest.raises(InputError, match="pickles are not read"):
        drawn(tiny_sd15, adapter=file)
    (tmp_path / "cut.safetensors").write_bytes(b"123")
    with pytest.raises(InputError, match="cannot be read"):
        SoftTokens.load(tmp_path / "cut.safetensors")
    save_file({"unet.x.lora_A.weight": torch.zeros(4, 8)} | {str(n): torch.zeros(2) for n in range(3)},
              tmp_path / "lora.safetensors")  # fmt: skip
    with pytest.raises(InputError, match="holds no soft tokens"):
        SoftTokens.load(tmp_path / "lora.safetensors")


def test_other_models_are_refused(tiny_sd15: Any, tiny_sdxl: Any) -> None:
    sd3, flux = tiny_pipeline("sd3").transformer, tiny_pipeline("flux").transformer
    tokens = tokens_for(tiny_sd15)
    for network, wanted in (
        (flux, r"not known for FluxTransformer2DModel: its text has places"),
        (nn.Linear(1, 1), "not known for Linear"),
        (sd3, "made for a UNet"),
        (tiny_sdxl.unet, "32 wide, and this model's text states 64"),
    ):
        with pytest.raises(InputError, match=wanted):
            tokens.attach(network)
    with pytest.raises(InputError, match="made for SD3"):
        SoftTokens(torch.zeros(2, 4, 32)).attach(tiny_sd15.unet)
    with pytest.raises(InputError, match="for 3 blocks, and this model has 2"):
        SoftTokens(torch.zeros(3, 4, 16)).attach(sd3)
    with pytest.raises(InputError, match="layers is 5, but the model has 2 blocks"):
        SoftTokens.initial(sd3, torch.Generator())
    with pytest.raises(InputError, match=r"need \(n, 32\)"):
        SoftTokens(torch.zeros(2, 4, 16), torch.zeros(100, 16))
    with pytest.raises(InputError, match="stages are"):
        SoftTokens(torch.zeros(4, 16), stages=["left"])
