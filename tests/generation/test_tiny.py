"""Tiny pipelines have the keys of the full models, and draw pictures that tell inputs apart."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from generation import tiny_pipeline
from generation.tiny import TINY_FAMILIES
from mmalign.errors import InputError


@pytest.fixture(scope="module", params=TINY_FAMILIES)
def pipeline(request: pytest.FixtureRequest) -> Any:
    made = tiny_pipeline(request.param)
    made.set_progress_bar_config(disable=True)
    return made


def draw(pipeline: Any, prompt: str, seed: int) -> np.ndarray:
    """Pixels on the scale of 0 to 255."""
    generator = torch.Generator().manual_seed(seed)
    options = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "np"}
    return pipeline(prompt=prompt, generator=generator, **options).images[0] * 255


def test_prompts_and_seeds_are_visible(pipeline: Any) -> None:
    image = draw(pipeline, "a red bicycle in snow", 0)
    assert image.shape == (64, 64, 3)
    assert image.std() > 20
    for other in (("a red bicycle in snow", 1), ("an elephant at night", 0), ("", 0)):
        assert np.abs(image - draw(pipeline, *other)).mean() > 5


def test_bfloat16_draws_nearly_the_same(pipeline: Any) -> None:
    whole = draw(pipeline, "a dog", 3)
    half = copy.deepcopy(pipeline).to(torch.bfloat16)
    image = draw(half, "a dog", 3)
    assert np.isfinite(image).all()
    assert np.abs(image - whole).mean() < 20


def test_weights_depend_on_the_seed_alone() -> None:
    def weights(seed: int) -> list[torch.Tensor]:
        made = tiny_pipeline(seed=seed)
        return [tensor for part in ("unet", "vae", "text_encoder_2") for tensor in getattr(made, part).parameters()]

    torch.manual_seed(11)
    state = torch.random.get_rng_state()
    first = weights(5)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(12)
    assert all(torch.equal(a, b) for a, b in zip(first, weights(5), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, weights(6), strict=True) if a.ndim > 1)


def test_deep_sdxl_has_the_adapter_keys_of_the_full_model() -> None:
    unet = tiny_pipeline("sdxl", deep=True).unet
    linear = {name for name, layer in unet.named_modules() if isinstance(layer, torch.nn.Linear)}
    adapted = [name for name in linear if name.endswith(("to_q", "to_k", "to_v", "to_out.0"))]
    # SDXL: 2 stacks of 2 blocks and 2 of 10 going down, 1 of 10, 3 of 10 and 3 of 2 going up; 8 layers a block.
    assert len(adapted) == 8 * (2 * 2 + 2 * 10 + 10 + 3 * 10 + 3 * 2) == 560
    assert sum(weight.numel() for weight in unet.parameters()) == 592_244  # measured for the method card
    assert "up_blocks.0.attentions.2.transformer_blocks.9.attn2.to_out.0" in linear


def test_vae_is_as_a_trained_one(pipeline: Any) -> None:
    vae = pipeline.vae
    images = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
    assert posterior.mean.shape == (8, vae.config.latent_channels, 8, 8)
    latents = (posterior.mean - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
    assert latents.std() == pytest.approx(1, abs=0.3)
    assert posterior.std.max() < 0.2


def test_denoiser_answers_noise_with_unit_variance(tiny_sdxl: Any) -> None:
    generator = torch.Generator().manual_seed(9)
    conditions = {"text_embeds": torch.randn(2, 32, generator=generator), "time_ids": torch.ones(2, 6) * 64}
    with torch.no_grad():
        noise = tiny_sdxl.unet(
            torch.randn(2, 4, 8, 8, generator=generator),
            torch.tensor([500, 600]),
            torch.randn(2, 77, 64, generator=generator),
            added_cond_kwargs=conditions,
        ).sample
    assert 0.5 < noise.std() < 2


@pytest.mark.parametrize("text", ["", "a photo of 3 café tables!", "日本語 🙂", "x" * 500])
def test_small_tokenizer_spells_what_clip_spells(tiny_sdxl: Any, text: str) -> None:
    from transformers import CLIPTokenizer

    tokenizer: CLIPTokenizer = tiny_sdxl.tokenizer
    ids = tokenizer(text, padding="max_length", truncation=True, max_length=77).input_ids
    assert len(tokenizer) == 1000
    assert len(ids) == 77
    assert ids[0] == 998
    assert 999 in ids
    whole = tokenizer(text).input_ids[1:-1]
    assert tokenizer.decode(whole).replace(" ", "") == text.replace(" ", "")
    assert tiny_sdxl.tokenizer_2(text, padding="max_length").input_ids[-1] in (0, 999) or len(whole) > 75


def test_small_merges_are_the_first_of_clip(tiny_sdxl: Any) -> None:
    from open_clip.tokenizer import SimpleTokenizer

    full = SimpleTokenizer()
    common = [word for word in ("the", "and", "on", "man", "in") if full.encoder[word + "</w>"] < 998]
    assert common
    for word in common:
        assert tiny_sdxl.tokenizer(word).input_ids == [998, full.encoder[word + "</w>"], 999]


def test_t5_tokenizer_keeps_texts_apart() -> None:
    tokenizer = tiny_pipeline("sd3").tokenizer_3
    first, second = tokenizer(["a red dog", "a red cat"], padding="max_length", max_length=32).input_ids
    assert first != second
    assert len(first) == 32
    assert first[-1] == 0
    assert 1 in first
    assert 2 not in first, "plain English has no unknown pieces"


def test_unknown_family() -> None:
    with pytest.raises(InputError, match="sdxl, sd15, sd3, flux"):
        tiny_pipeline("sdxxl")
