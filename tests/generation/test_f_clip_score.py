"""F-CLIPScore as a reward, and the influence of words on any reward."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from generation.rewards import CosineReward, EmbeddingReward
from generation.rewards.f_clip_score import FCLIPScore
from generation.rewards.word_influence import word_influence
from mmalign import Encoder
from mmalign.errors import InputError
from mmalign.imaging import read_image
from mmalign.word_attribution import word_attribution

PROMPTS = ["a dog on grass", "two bicycles, and an empty street.", "Zebras"]


@pytest.fixture
def files(photos: Path) -> list[Path]:
    return sorted(photos.glob("*.jpg"))[:3]


def vectors(encoder: Encoder, files: Sequence[Path]) -> Tensor:
    """As a reward sees images: resized in float, not in whole numbers."""
    return CosineReward(encoder).image_embeds([read_image(file).pixels.float() / 255 for file in files]).detach()


@pytest.mark.parametrize("name", ["tiny_open_clip", "tiny_clip"])
def test_it_is_that_of_the_words(request: pytest.FixtureRequest, files: list[Path], name: str) -> None:
    encoder = request.getfixturevalue(name)
    found = word_attribution(encoder, vectors(encoder, files), PROMPTS)
    eps = float(np.median([word.score for one in found for word in one.words if word.score < 0]))
    reward = FCLIPScore(encoder, eps=eps)
    scores = reward(files, PROMPTS)
    np.testing.assert_allclose(scores, [one.f_clip_score(eps) for one in found], rtol=1e-4, atol=1e-9)
    assert scores.min() < eps / 2
    assert (scores <= 0).all()
    with torch.no_grad():
        again, terms = reward.score_terms([read_image(file).pixels.float() / 255 for file in files], PROMPTS)
    np.testing.assert_allclose(again, scores, rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(terms["cosine"], [one.cosine for one in found], atol=1e-5)
    assert list(terms["flagged"]) == [len(one.flagged(eps)) for one in found]
    strict = FCLIPScore(encoder, eps=-1.0)
    assert (strict(files, PROMPTS) == 0).all()


def test_gradients_reach_the_pixels(tiny_open_clip: Encoder, files: list[Path]) -> None:
    reward = FCLIPScore(tiny_open_clip, eps=0.0)
    assert reward.differentiable
    image = (read_image(files[0]).pixels[:, :90, :120].float() / 255).requires_grad_()
    reward.score([image], PROMPTS[1:2]).sum().backward()
    assert image.grad is not None
    slope = float(image.grad.norm())
    direction = image.grad / slope
    with torch.no_grad():
        ends = [reward.score_terms([image + step * direction], PROMPTS[1:2]) for step in (0.02, -0.02)]
    assert ends[0][1]["flagged"] == ends[1][1]["flagged"]
    assert slope > 1e-6
    assert float(ends[0][0][0] - ends[1][0][0]) / 0.04 == pytest.approx(slope, rel=0.05)
    # Where nothing is flagged there is no gradient.
    image.grad = None
    FCLIPScore(tiny_open_clip, eps=-1.0).score([image], PROMPTS[1:2]).sum().backward()
    assert not image.grad.any()


def test_its_fingerprint_and_what_it_refuses(tiny_open_clip: Encoder, tiny_siglip: Encoder, bundled: Encoder) -> None:
    variants = [{}, {"eps": -1e-5}, {"layers": 1}, {"layers": None}, {"template": ""}]
    found = {FCLIPScore(tiny_open_clip, **options).fingerprint for options in variants}  # type: ignore[arg-type]
    assert len(found) == len(variants)
    assert all(tiny_open_clip.fingerprint in str(one) for one in found)
    for encoder in (tiny_siglip, bundled):
        with pytest.raises(InputError, match="supported are CLIPs"):
            FCLIPScore(encoder)
    with pytest.raises(InputError, match="eps is 1"):
        FCLIPScore(tiny_open_clip, eps=1)
    with pytest.raises(InputError, match="end it in a space"):
        FCLIPScore(tiny_open_clip, template="A photo of")


def test_a_word_that_contradicts_the_image_lowers_the_score(
    bundled: Encoder, photos: Path, captions: list[dict[str, Any]]
) -> None:
    row = next(row for row in captions if any("horse" in caption.lower() for caption in row["captions"]))
    found = dict(
        word_influence(CosineReward(bundled), photos / row["file"], "horses and a submarine on grass, grazing")
    )
    assert list(found) == ["horses", "and", "a", "submarine", "on", "grass", "grazing"]
    assert found["submarine"] < 0 < found["grazing"]
    assert found["horses"] == max(found.values())


class CountsLetters:
    """Of the prompt, times the brightness."""

    def __init__(self) -> None:
        self.prompts: list[str] = []

    def __call__(self, images: Sequence[Tensor], prompts: Sequence[str]) -> list[float]:
        self.prompts += prompts
        return [float(image.mean()) * len(prompt) for image, prompt in zip(images, prompts, strict=True)]


def test_each_word_is_left_out_once() -> None:
    judge = CountsLetters()
    found = word_influence(judge, torch.full((3, 4, 4), 0.5), "a red, red car . parked")
    assert [tuple(one) for one in found] == [
        ("a", 1.0), ("red", 1.5), ("red", 2.0), ("car", 2.0), ("parked", 3.5)
    ]  # fmt: skip
    assert judge.prompts == [
        "a red, red car . parked",
        "red, red car . parked",
        "a , red car . parked",
        "a red, car . parked",
        "a red, red . parked",
        "a red, red car .",
    ]


def test_a_reward_of_vectors_looks_once(tiny_open_clip: Encoder, files: list[Path]) -> None:
    class Counting(CosineReward):
        looks = 0

        def image_embeds(self, images: Sequence[Tensor]) -> Tensor:
            self.looks += len(images)
            return super().image_embeds(images)

    reward = Counting(tiny_open_clip)
    prompt = "a dog and a cat and a cow and a goat and a sheep and a horse and a hen and a duck"  # two batches
    found = word_influence(reward, files[0], prompt)
    assert reward.looks == 1
    whole = reward([files[0]], prompt)[0]
    for word in (1, 22):
        others = prompt.split()
        del others[word]
        assert found[word].influence == pytest.approx(whole - reward([files[0]], " ".join(others))[0], abs=1e-6)
    assert np.std([one.influence for one in found]) > 1e-4


class Beauty(EmbeddingReward):
    uses_text = False

    def score_embeds(self, image_embeds: Tensor, text_embeds: Tensor | None) -> Tensor:
        return image_embeds[:, 0]


def test_what_has_no_words(tiny_open_clip: Encoder) -> None:
    with pytest.raises(InputError, match="does not look at the prompt"):
        word_influence(Beauty(tiny_open_clip), torch.zeros(3, 4, 4), "a dog")
    for prompt in ("dog", "dog !", ""):
        with pytest.raises(InputError, match="two words or more"):
            word_influence(CountsLetters(), torch.zeros(3, 4, 4), prompt)
