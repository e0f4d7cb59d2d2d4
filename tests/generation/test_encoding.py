"""Latents and embeddings against the pipeline's own, and fingerprints that change with what they depend on."""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import pytest
import torch
from torch import Tensor

from generation import tiny_pipeline
from generation.tiny.tokenizers import clip_tokenizer
from generation.training.encoding import LatentEncoder, PromptEncoder

CPU = torch.device("cpu")
KEYS = [hashlib.sha256(str(n).encode()).hexdigest() for n in range(150)]


@pytest.fixture(scope="module")
def image() -> Tensor:
    smooth = torch.nn.functional.interpolate(
        torch.rand(1, 3, 8, 12, generator=torch.Generator().manual_seed(0)), size=(64, 96), mode="bicubic"
    )
    return smooth[0].clamp(0, 1) * 2 - 1


def posterior(vae: Any, image: Tensor) -> Any:
    with torch.no_grad():
        return vae.encode(image[None]).latent_dist


def test_latents_are_samples_of_the_posterior_times_the_factor(tiny_sdxl: Any, image: Tensor) -> None:
    encoder = LatentEncoder(tiny_sdxl.vae, CPU)
    drawn = torch.stack([encoder.encode(image, key) for key in KEYS])
    expected = posterior(tiny_sdxl.vae, image)
    assert drawn.shape == (150, 4, 8, 12)
    assert drawn.dtype == torch.float32
    noise = (drawn / 0.13025 - expected.mean) / expected.std
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01
    assert abs(noise.mean(0)).max() < 6 / 150**0.5
    assert abs(torch.corrcoef(noise.flatten(1))[~torch.eye(150, dtype=torch.bool)]).max() < 6 / 384**0.5


def test_a_latent_is_a_function_of_image_and_key_alone(latent_encoder: LatentEncoder, image: Tensor) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = latent_encoder.encode(image, KEYS[0])
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(latent_encoder.encode(image, KEYS[0]), first)
    assert not torch.equal(latent_encoder.encode(image, KEYS[1]), first)


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_the_shift_of_flow_models(family: str, image: Tensor) -> None:
    """Against the middle of the posterior; noise has a mean of its own in each channel, which many draws average."""
    vae = tiny_pipeline(family).vae
    shift, factor = vae.config.shift_factor, vae.config.scaling_factor
    assert shift
    encoder = LatentEncoder(vae, CPU)
    drawn = torch.stack([encoder.encode(image, key) for key in KEYS])
    expected = posterior(vae, image)
    noise = (drawn / factor + shift - expected.mean) / expected.std
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01


def test_latents_mean_and_std_are_honoured_and_decoding_undoes_it(tiny_sdxl: Any, image: Tensor) -> None:
    mean, std = [0.5, -1.0, 2.0, 0.0], [2.0, 0.5, 1.0, 3.0]
    vae = copy.deepcopy(tiny_sdxl.vae)
    plain = LatentEncoder(vae, CPU).encode(image, KEYS[0]) / 0.13025
    vae.register_to_config(latents_mean=mean, latents_std=std)
    encoder = LatentEncoder(vae, CPU)
    latent = encoder.encode(image, KEYS[0])
    for channel in range(4):
        expected = (plain[channel] - mean[channel]) / std[channel] * 0.13025
        torch.testing.assert_close(latent[channel], expected)
    with torch.no_grad():
        torch.testing.assert_close(encoder.decode(latent), vae.decode(plain[None]).sample[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["tiny_sdxl", "tiny_sd15"])
def test_decoding_is_the_pipelines(kind: str, image: Tensor, request: pytest.FixtureRequest) -> None:
    pipeline = request.getfixturevalue(kind)
    encoder = LatentEncoder(pipeline.vae, CPU)
    latent = encoder.encode(image, KEYS[0])
    with torch.no_grad():
        expected = pipeline.vae.decode(latent[None] / pipeline.vae.config.scaling_factor).sample
    torch.testing.assert_close(encoder.decode(latent), expected[0])
    wide = latent.repeat(1, 1, 7)  # 672 px: tiles of 512, three quarters of which are not blended
    made = encoder.decode(wide)
    assert made.shape == (3, 64, 672)
    torch.testing.assert_close(made[..., :384], encoder.decode(wide[..., :64])[..., :384])
    assert not pipeline.vae.use_tiling


def test_prompts_are_encoded_as_the_pipeline_does(tiny_sdxl: Any, prompt_encoder: PromptEncoder) -> None:
    for caption in ("a red bicycle in snow", "", "猫 & naïve café", "word " * 200):
        found = prompt_encoder.encode(caption)
        with torch.no_grad():
            expected = tiny_sdxl.encode_prompt(caption, device=CPU, do_classifier_free_guidance=False)
        assert torch.equal(found["prompt_embeds"], expected[0][0])
        assert torch.equal(found["pooled_prompt_embeds"], expected[2][0])


def test_embeddings_are_the_last_but_one_states_of_both_encoders(tiny_sdxl: Any, prompt_encoder: PromptEncoder) -> None:
    caption = "two dogs on a beach"
    states = []
    for number in ("", "_2"):
        tokenizer, encoder = (getattr(tiny_sdxl, name + number) for name in ("tokenizer", "text_encoder"))
        ids = tokenizer(caption, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        assert ids[0, -1] == (0 if number else tokenizer.eos_token_id)
        with torch.no_grad():
            output = encoder(ids, output_hidden_states=True)
        states.append(output.hidden_states[-2][0])
    found = prompt_encoder.encode(caption)
    torch.testing.assert_close(found["prompt_embeds"], torch.cat(states, dim=-1))
    torch.testing.assert_close(found["pooled_prompt_embeds"], output.text_embeds[0])


def test_unconditional_is_what_the_pipeline_guides_away_from(tiny_sdxl: Any, tiny_sd15: Any) -> None:
    for pipeline in (tiny_sdxl, tiny_sd15):
        found = PromptEncoder(pipeline, CPU).encode(None)
        with torch.no_grad():
            embeds = pipeline.encode_prompt(
                "a dog", device=CPU, num_images_per_prompt=1, do_classifier_free_guidance=True
            )
        assert torch.equal(found["prompt_embeds"], embeds[1][0])
        if len(embeds) == 4:
            assert torch.equal(found["pooled_prompt_embeds"], embeds[3][0])
            assert not any(value.any() for value in found.values())
        else:
            assert list(found) == ["prompt_embeds"]
            assert found["prompt_embeds"].any()


def test_unconditional_of_an_sdxl_that_does_not_zero_is_the_empty_text(tiny_sdxl: Any) -> None:
    pipeline = type(tiny_sdxl)(**tiny_sdxl.components, force_zeros_for_empty_prompt=False)
    encoder = PromptEncoder(pipeline, CPU)
    assert torch.equal(encoder.encode(None)["prompt_embeds"], encoder.encode("")["prompt_embeds"])
    assert encoder.encode(None)["pooled_prompt_embeds"].any()
    assert encoder.fingerprint != PromptEncoder(tiny_sdxl, CPU).fingerprint


def test_fingerprint_of_a_vae_is_of_what_makes_latents(tiny_sdxl: Any, latent_encoder: LatentEncoder) -> None:
    seen = {latent_encoder.fingerprint}

    def changed(**config: Any) -> str:
        vae = copy.deepcopy(tiny_sdxl.vae)
        vae.register_to_config(**config)
        return LatentEncoder(vae, CPU).fingerprint

    for config in ({"scaling_factor": 0.2}, {"latents_mean": [0.0, 0, 0, 1]}, {"latents_std": [1.0, 1, 1, 2]},
                   {"norm_num_groups": 2}):  # fmt: skip
        seen.add(changed(**config))
    other = copy.deepcopy(tiny_sdxl.vae)
    with torch.no_grad():
        other.encoder.conv_in.weight[0, 0, 0, 0] += 1e-3
    seen.add(LatentEncoder(other, CPU).fingerprint)
    assert len(seen) == 6
    assert changed(sample_size=512) == latent_encoder.fingerprint
    assert LatentEncoder(copy.deepcopy(tiny_sdxl.vae).double(), CPU).fingerprint == latent_encoder.fingerprint


def test_fingerprint_of_text_encoders_is_of_what_makes_embeddings(
    tiny_sdxl: Any, tiny_sd15: Any, prompt_encoder: PromptEncoder
) -> None:
    def changed(**parts: Any) -> str:
        return PromptEncoder(type(tiny_sdxl)(**{**tiny_sdxl.components, **parts}), CPU).fingerprint

    nudged, quick = copy.deepcopy(tiny_sdxl.text_encoder_2), copy.deepcopy(tiny_sdxl.text_encoder)
    with torch.no_grad():
        next(nudged.parameters())[0, 0] += 1e-3
    quick.config.hidden_act = "quick_gelu"
    found = {
        prompt_encoder.fingerprint,
        PromptEncoder(tiny_sd15, CPU).fingerprint,
        changed(text_encoder_2=nudged),
        changed(text_encoder=quick),
        changed(tokenizer_2=clip_tokenizer()),  # pads with another token
    }
    assert len(found) == 5
    wide = copy.deepcopy(tiny_sdxl.text_encoder).double()
    assert changed(text_encoder=wide) == changed() == prompt_encoder.fingerprint
