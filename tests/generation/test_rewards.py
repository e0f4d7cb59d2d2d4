"""Rewards: any callable, any kind of image, and gradients that are those of the score."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from generation import GeneratedImage
from generation.rewards import CosineReward, Reward, as_reward
from mmalign import Encoder
from mmalign.errors import InputError, UnreadableImageError
from mmalign.imaging import read_image

PROMPTS = ["a dog on grass", "two bicycles", "an empty street"]


@pytest.fixture
def files(photos: Path) -> list[Path]:
    return sorted(photos.glob("*.jpg"))[:3]


def test_the_cosine_is_that_of_the_encoder(tiny_open_clip: Encoder, files: list[Path]) -> None:
    wanted = np.einsum("nd,nd->n", tiny_open_clip.encode_images(files), tiny_open_clip.encode_texts(PROMPTS))
    scores = CosineReward(tiny_open_clip)(files, PROMPTS)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, wanted, atol=2e-3)  # resized in float here, in whole numbers there
    assert np.ptp(wanted) > 0.02


def test_every_kind_of_image_scores_the_same(tiny_open_clip: Encoder, files: list[Path]) -> None:
    pixels = read_image(files[0]).pixels
    array = pixels.permute(1, 2, 0).numpy()
    kinds = [
        files[0],
        files[0].read_bytes(),
        pixels,
        pixels.float() / 255,
        array,
        Image.fromarray(array),
        GeneratedImage(Image.fromarray(array), "another prompt", 0, {}),
    ]
    scores = CosineReward(tiny_open_clip)(kinds, PROMPTS[0])
    np.testing.assert_allclose(scores, scores[0], atol=1e-6)


def test_gradients_reach_the_pixels(tiny_open_clip: Encoder, files: list[Path]) -> None:
    reward = CosineReward(tiny_open_clip)
    assert reward.differentiable
    images = [(read_image(file).pixels[:, :90, :120].float() / 255).requires_grad_() for file in files[:2]]
    scores = reward.score(images, PROMPTS[:2])
    scores.sum().backward()
    for image, prompt in zip(images, PROMPTS, strict=False):
        assert image.grad is not None
        slope = float(image.grad.norm())
        direction = image.grad / slope
        with torch.no_grad():
            above, below = (reward.score([image + step * direction], [prompt])[0] for step in (0.05, -0.05))
        assert slope > 1e-4
        assert float(above - below) / 0.1 == pytest.approx(slope, rel=0.05)


def test_an_encoder_without_texts_cannot_score(tiny_timm: Encoder) -> None:
    with pytest.raises(InputError, match="text"):
        CosineReward(tiny_timm)


def test_the_fingerprint_follows_the_encoder(tiny_open_clip: Encoder) -> None:
    assert tiny_open_clip.fingerprint in str(CosineReward(tiny_open_clip).fingerprint)


class Brightness:
    """A callable; notes what it was asked."""

    fingerprint = "brightness"

    def __init__(self) -> None:
        self.asked: list[tuple[int, list[str]]] = []

    def __call__(self, images: Sequence[Tensor], prompts: Sequence[str]) -> list[Tensor]:
        assert not torch.is_grad_enabled()
        self.asked.append((len(images), list(prompts)))
        return [image.mean() for image in images]


def test_any_callable_is_a_reward_and_is_asked_in_batches() -> None:
    function = Brightness()
    reward = as_reward(function)
    images = [torch.full((3, 4 + i, 5), i / 40) for i in range(40)]
    np.testing.assert_allclose(reward(iter(images), "one for all"), np.arange(40) / 40, rtol=1e-6)
    assert [count for count, _ in function.asked] == [16, 16, 8]
    assert {prompt for _, prompts in function.asked for prompt in prompts} == {"one for all"}

    function.asked.clear()
    reward(torch.stack([torch.zeros(3, 4, 4)] * 18), [f"{i}" for i in range(18)])
    assert [prompts for _, prompts in function.asked] == [[f"{i}" for i in range(16)], ["16", "17"]]

    assert reward([], []).shape == (0,)
    assert (reward.fingerprint, reward.differentiable) == ("brightness", False)
    assert as_reward(reward) is reward
    assert as_reward(lambda images, prompts: [0] * len(images)).fingerprint is None


def test_a_reward_of_ones_own() -> None:
    class Tall(Reward):
        def score(self, images: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
            return torch.tensor([[image.shape[1] * len(prompt)] for image, prompt in zip(images, prompts, strict=True)])

    assert as_reward(Tall())([np.zeros((4, 2, 3), np.uint8), torch.zeros(3, 6, 2)], ["a", "bc"]).tolist() == [4, 12]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1.0], "returned 1 numbers for 2 images"),
        ([1.0, 2.0, 3.0], "returned 3 numbers for 2 images"),
        (None, "returned NoneType"),
        (torch.tensor(1.0), "returned Tensor"),
        (torch.ones(2, 2), "returned Tensor"),
        (["good", "bad"], "returned list"),
    ],
)
def test_results_that_are_no_scores(result: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        as_reward(lambda images, prompts: result)([torch.zeros(3, 2, 2)] * 2, "x")


def test_questions_that_are_none() -> None:
    reward = as_reward(Brightness())
    with pytest.raises(InputError, match="3 prompts for 1 images"):
        reward([torch.zeros(3, 2, 2)], PROMPTS)
    for one in ("a.png", Path("a.png"), Image.new("RGB", (2, 2)), torch.zeros(3, 2, 2)):
        with pytest.raises(InputError, match="one image; give a list"):
            reward(one, "x")
    with pytest.raises(UnreadableImageError, match="does not exist"):
        reward(["absent.png"], "x")
    for wrong in (3, CosineReward):
        with pytest.raises(InputError, match="is no reward"):
            as_reward(wrong)  # type: ignore[arg-type]
