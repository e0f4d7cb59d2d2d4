"""The direction of D2-Align: what it is, what it costs, and that a reward with it is a reward."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from generation.rewards import CosineReward, EmbeddingReward
from generation.rewards.direction import (
    DirectionalReward,
    DirectionFit,
    RewardDirection,
    fit_reward_direction,
    learn_reward_direction,
)
from generation.rewards.guided_texts import guided_reward, guided_text_embeds, matched_gap
from mmalign import Encoder
from mmalign.errors import EncoderMismatchError, InputError, NonFiniteLossError

SWITCHES = [(True, True), (True, False), (False, True), (False, False)]


def random_pairs(n: int = 6, dim: int = 10, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images, texts = (torch.randn(n, dim, generator=generator, dtype=torch.float64) for _ in range(2))
    return 3 * images, 2 * texts


def two_cones(n: int = 256, dim: int = 64) -> tuple[Tensor, Tensor]:
    """Images around one mean, texts around another, and what they share: the geometry of a CLIP."""
    generator = torch.Generator().manual_seed(0)
    image_mean, text_mean = torch.randn(2, dim, generator=generator)
    shared, image_noise, text_noise = torch.randn(3, n, dim, generator=generator)
    return normalize(image_mean + 0.5 * shared + 0.4 * image_noise), normalize(
        text_mean + 0.5 * shared + 0.4 * text_noise
    )


@pytest.mark.parametrize("omega", [1.5, 1.0, 0.2, -1.0])
@pytest.mark.parametrize("renormalize", [True, False])
def test_the_first_gradient_is_the_mean_image_beside_the_text(omega: float, renormalize: bool) -> None:
    images, texts = random_pairs()
    b = torch.zeros(10, dtype=torch.float64, requires_grad=True)
    (-guided_reward(images, texts, b, omega, renormalize=renormalize).mean()).backward()
    wanted = torch.zeros(10, dtype=torch.float64)
    for i, t in zip(normalize(images), normalize(texts), strict=True):
        wanted -= (2 * omega - 1) * (i - t * (t @ i)) / len(images)
    torch.testing.assert_close(b.grad, wanted)


@pytest.mark.parametrize(("normalize_text", "renormalize"), SWITCHES)
def test_gradients_are_those_of_finite_differences(normalize_text: bool, renormalize: bool) -> None:
    images, texts = random_pairs(3, 5)
    b = torch.tensor([0.3, -0.2, 0.1, 0.4, -0.1], dtype=torch.float64)

    def reward(*inputs: Tensor) -> Tensor:
        return guided_reward(*inputs, 1.7, normalize_text=normalize_text, renormalize=renormalize)

    assert torch.autograd.gradcheck(reward, [x.clone().requires_grad_() for x in (images, texts, b)])


def test_the_reward_changes_with_the_length_of_texts_only_without_normalisation() -> None:
    images, texts = random_pairs()
    b = torch.full((10,), 0.2, dtype=torch.float64)
    torch.testing.assert_close(guided_reward(images, 5 * texts, b), guided_reward(7 * images, texts, b))
    raw = [guided_reward(images, scale * texts, b, normalize_text=False) for scale in (1, 5)]
    assert (raw[0] - raw[1]).abs().max() > 1e-3
    tilde = guided_text_embeds(texts, b).e_tilde
    dots = (normalize(images) * tilde).sum(1)
    torch.testing.assert_close(guided_reward(images, texts, b, renormalize=False), dots)
    torch.testing.assert_close(guided_reward(images, texts, b), dots / tilde.norm(dim=1))


def test_at_a_half_there_is_no_signal() -> None:
    images, texts = random_pairs()
    fit = DirectionFit(images[0], omega=0.5, lr=0.1, weight_decay=0.0, max_grad_norm=1.0)
    _, norm = fit.step(images, texts)
    assert norm < 1e-12
    with pytest.raises(InputError, match=r"omega is 0\.5"):
        fit_reward_direction(images, texts, omega=0.5)


@pytest.mark.parametrize(("normalize_text", "renormalize"), SWITCHES)
def test_the_gap_is_that_of_all_pairs(normalize_text: bool, renormalize: bool) -> None:
    images, texts = random_pairs(8)
    texts[5] = texts[2]  # the same prompt twice: no mismatch
    b = torch.linspace(-0.3, 0.3, 10, dtype=torch.float64)
    how: dict[str, Any] = {"normalize_text": normalize_text, "renormalize": renormalize}
    own, others = [], []
    for i in range(8):
        for j in range(8):
            score = float(guided_reward(images[i : i + 1], texts[j : j + 1], b, 1.5, **how))
            if i == j:
                own.append(score)
            elif {i, j} != {2, 5}:
                others.append(score)
    assert matched_gap(images, texts, b, 1.5, **how) == pytest.approx(np.mean(own) - np.mean(others), abs=1e-12)
    assert math.isnan(matched_gap(images, texts[:1].expand(8, -1), b))


def test_the_longer_the_direction_the_less_the_prompt_counts() -> None:
    images, texts = two_cones()
    found = [fit_reward_direction(images, texts, steps=300, lr=lr, seed=1) for lr in (5e-5, 2e-4, 1e-3, 2e-2)]
    norms, gaps, losses = ([getattr(one, name) for one in found] for name in ("norm", "gap", "loss"))
    assert norms == sorted(norms)
    assert losses[:3] == sorted(losses[:3], reverse=True)
    assert norms[0] <= 5e-5 * 300 * math.sqrt(64)
    # Where the means of both cones are orthogonal, a short one even helps.
    assert gaps[0] == pytest.approx(found[0].gap_without, rel=0.1)
    assert gaps[1:] == sorted(gaps[1:], reverse=True)
    assert gaps[3] < 0.7 * found[0].gap_without
    lengths = [matched_gap(images, texts, scale * normalize(found[0].b, dim=0)) for scale in (0.7, 1, 2, 5, 50)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-1] < 0.1 * lengths[0]
    # The part of the mean image that the texts do not have.
    mean_image, mean_text = normalize(images.mean(0), dim=0), normalize(texts.mean(0), dim=0)
    assert normalize(found[3].b, dim=0) @ mean_image > 0.85
    rest = normalize(mean_image - mean_text * (mean_text @ mean_image), dim=0)
    assert normalize(found[0].b, dim=0) @ rest > 0.7  # AdamW's first steps are as long in every coordinate
    # In the limit all prompts look alike.
    far = guided_text_embeds(texts, 1e6 * found[0].b)
    torch.testing.assert_close(far.e_tilde, (2 * normalize(found[0].b, dim=0)).expand_as(texts), atol=1e-4, rtol=0)


def test_what_is_reported_is_what_is_there() -> None:
    images, texts = two_cones(100)
    direction = fit_reward_direction(images, texts, steps=50, lr=1e-3, batch_size=16, renormalize=False)
    assert direction.norm == pytest.approx(float(direction.b.norm()))
    assert direction.loss == pytest.approx(
        -float(guided_reward(images, texts, direction.b, renormalize=False).mean()), abs=1e-6
    )
    assert direction.gap == pytest.approx(matched_gap(images, texts, direction.b, renormalize=False), abs=1e-6)
    assert direction.gap_without == pytest.approx(matched_gap(images, texts, torch.zeros(64)), abs=1e-6)
    steps = [line["step"] for line in direction.curve]
    assert (steps[0], steps[-1], direction.curve[0]["norm"]) == (0, 50, 0)
    assert direction.curve[-1]["norm"] == direction.norm
    assert direction.settings["batch_size"] == 16
    assert not torch.equal(direction.b, fit_reward_direction(images, texts, steps=50, lr=1e-3).b)


def test_the_seed_alone_decides() -> None:
    images, texts = two_cones(40)
    before = torch.get_rng_state()
    found = [fit_reward_direction(images, texts, steps=20, batch_size=8, seed=seed).b for seed in (0, 0, 1)]
    with torch.inference_mode():
        encoded = images * 1, texts * 1
    with torch.no_grad():
        found[1] = fit_reward_direction(*encoded, steps=20, batch_size=8).b
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert torch.equal(before, torch.get_rng_state())


def test_no_longer_than_allowed() -> None:
    images, texts = two_cones(60)
    options: dict[str, Any] = {"steps": 60, "lr": 1e-2}
    free = fit_reward_direction(images, texts, **options)
    held = fit_reward_direction(images, texts, max_norm=0.2, **options)
    assert free.norm > 0.4
    assert max(line["norm"] for line in held.curve) == pytest.approx(0.2, abs=1e-6)
    assert held.gap > free.gap


def test_what_cannot_be_learnt_from() -> None:
    images, texts = two_cones(20)
    for name in ("image_embeds", "text_embeds"):
        for value in (math.nan, math.inf):
            given = {"image_embeds": images.clone(), "text_embeds": texts.clone()}
            given[name][3, 5] = value
            with pytest.raises(InputError, match=f"{name} row 3 holds NaN or infinity"):
                fit_reward_direction(**given)
    with pytest.raises(InputError, match=r"\(20, 64\) and \(19, 64\)"):
        fit_reward_direction(images, texts[:19])
    with pytest.raises(InputError, match=r"\(20, 64\) and \(20, 63\)"):
        fit_reward_direction(images, texts[:, :63])
    with pytest.raises(InputError, match="all text_embeds are of one prompt"):
        fit_reward_direction(images, texts[:1].repeat(20, 1))
    with pytest.raises(InputError, match="image_embeds row 7 is zero"):
        fit_reward_direction(images * (torch.arange(20) != 7)[:, None], texts)
    for options in ({"steps": 0}, {"lr": 0.0}, {"max_norm": 0.0}, {"batch_size": 0}, {"omega": math.nan}):
        (name,) = options
        with pytest.raises(InputError, match=f"{name} is"):
            fit_reward_direction(images, texts, **options)
    fit = DirectionFit(images[0], omega=1.5, lr=0.1, weight_decay=0.0, max_grad_norm=1.0)
    with pytest.raises(NonFiniteLossError, match="lower lr"):
        fit.step(images * math.inf, texts)
    assert not fit.b.any()


def some_direction(reward: EmbeddingReward, **changes: Any) -> RewardDirection:
    images, texts = two_cones(40, reward.encoder.dim)
    options = {"steps": 30, "lr": 2e-2, "reward": reward, **changes}
    return fit_reward_direction(images, texts, **options)


def test_a_file_of_it(tiny_open_clip: Encoder, tmp_path: Path) -> None:
    direction = some_direction(CosineReward(tiny_open_clip), renormalize=False, max_norm=0.7)
    again = RewardDirection.load(direction.save(tmp_path / "sub" / "b.safetensors"))
    assert torch.equal(again.b, direction.b)
    assert again.to_dict() == json.loads(json.dumps(direction.to_dict())) == direction.to_dict()
    assert again.encoder == tiny_open_clip.fingerprint
    assert again.curve == direction.curve
    assert (again.renormalize, again.settings["max_norm"]) == (False, 0.7)
    assert (tmp_path / "sub" / "b.safetensors").read_bytes() == again.save(tmp_path / "c.safetensors").read_bytes()
    with Image.open(direction.draw(tmp_path / "b.png")) as picture:
        assert np.asarray(picture.convert("L")).std() > 10

    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "c.safetensors").read_bytes()[:200])
    with pytest.raises(InputError, match="cannot be read"):
        RewardDirection.load(tmp_path / "cut.safetensors")
    with pytest.raises(InputError, match="cannot be read"):
        RewardDirection.load(tmp_path / "absent.safetensors")
    from safetensors.torch import save_file

    save_file({"b": torch.ones(3)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="holds no reward direction"):
        RewardDirection.load(tmp_path / "other.safetensors")


class Scaled(CosineReward):
    """As PickScore: a multiple of the cosine."""

    name = "scaled"
    range = (-100.0, 100.0)

    def score_embeds(self, image_embeds: Tensor, text_embeds: Tensor | None) -> Tensor:
        return 100 * super().score_embeds(image_embeds, text_embeds)


class Beauty(EmbeddingReward):
    name = "beauty"
    uses_text = False

    def score_embeds(self, image_embeds: Tensor, text_embeds: Tensor | None) -> Tensor:
        return image_embeds[:, 0]


@pytest.mark.parametrize(("normalize_text", "renormalize"), SWITCHES)
def test_a_reward_with_it(tiny_open_clip: Encoder, photos: Path, normalize_text: bool, renormalize: bool) -> None:
    files, prompts = sorted(photos.glob("*.jpg"))[:3], ["a dog on grass", "two bicycles", "an empty street"]
    how: dict[str, Any] = {"normalize_text": normalize_text, "renormalize": renormalize}
    reward = CosineReward(tiny_open_clip)
    direction = some_direction(reward, **how)
    directed = DirectionalReward(reward, direction)
    vectors = reward.image_embeds([torch.from_numpy(read(file)) for file in files]), reward.text_embeds(prompts)
    wanted = guided_reward(*vectors, direction.b, **how)
    scores = directed(files, prompts)
    np.testing.assert_allclose(scores, wanted.detach(), atol=1e-6)
    assert np.abs(scores - reward(files, prompts)).max() > 0.02
    scaled = DirectionalReward(Scaled(tiny_open_clip), direction)
    np.testing.assert_allclose(scaled(files, prompts), 100 * scores, atol=1e-4)
    assert scaled.range == ((-100.0, 100.0) if renormalize else (None, None))


def read(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image.convert("RGB"), dtype=np.float32).transpose(2, 0, 1) / 255


def test_gradients_reach_the_pixels(tiny_open_clip: Encoder, photos: Path) -> None:
    reward = CosineReward(tiny_open_clip)
    directed = DirectionalReward(reward, some_direction(reward))
    assert directed.differentiable
    image = torch.from_numpy(read(sorted(photos.glob("*.jpg"))[0])[:, :90, :120]).requires_grad_()
    directed.score([image], ["a dog on grass"]).sum().backward()
    assert image.grad is not None
    slope = float(image.grad.norm())
    with torch.no_grad():
        ends = [directed.score([image + s * image.grad / slope], ["a dog on grass"])[0] for s in (0.05, -0.05)]
    assert slope > 1e-4
    assert float(ends[0] - ends[1]) / 0.1 == pytest.approx(slope, rel=0.05)


def test_its_fingerprint_follows_reward_and_direction(tiny_open_clip: Encoder) -> None:
    reward = CosineReward(tiny_open_clip)
    directions = [some_direction(reward), some_direction(reward, lr=1e-2), some_direction(reward, renormalize=False)]
    found = [DirectionalReward(reward, one).fingerprint for one in directions]
    assert len({reward.fingerprint, *found}) == 4
    assert all(str(reward.fingerprint) in str(one) for one in found)
    nameless = CosineReward(tiny_open_clip)
    nameless.fingerprint = None
    assert DirectionalReward(nameless, directions[0]).fingerprint is None


def test_what_cannot_be_directed(tiny_open_clip: Encoder, tiny_clip: Encoder) -> None:
    reward = CosineReward(tiny_open_clip)
    direction = some_direction(reward)
    with pytest.raises(EncoderMismatchError, match="learnt from vectors of the encoder"):
        DirectionalReward(CosineReward(tiny_clip), direction)
    unknown = fit_reward_direction(*two_cones(20, 7), steps=1)
    with pytest.raises(InputError, match=r"7 dimensions .* have 32"):
        DirectionalReward(reward, unknown)
    with pytest.raises(InputError, match="beauty does not see the prompt"):
        DirectionalReward(Beauty(tiny_open_clip), direction)

    def judge(images: Sequence[Tensor], prompts: Sequence[str]) -> list[int]:
        return [0] * len(images)

    with pytest.raises(InputError, match=r"judge gives no vectors .* CLIPScore, PickScore"):
        learn_reward_direction(judge, [], [])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no images to learn from"):
        learn_reward_direction(reward, [], [])


def test_photographs_and_their_captions(bundled: Encoder, photos: Path, captions: list[dict[str, Any]]) -> None:
    rows = captions[:20]
    files, prompts = [photos / row["file"] for row in rows], [row["captions"][0] for row in rows]
    reward = CosineReward(bundled)
    direction = learn_reward_direction(reward, files, prompts, steps=400, lr=1e-4)
    assert direction.pairs == 20
    assert direction.encoder == bundled.fingerprint
    assert 0.1 < direction.norm <= 400 * 1e-4 * math.sqrt(384)
    assert direction.gap_without > 0.1
    assert 0.5 * direction.gap_without < direction.gap < direction.gap_without
    vectors = reward.image_embeds([torch.from_numpy(read(file)) for file in files]), reward.text_embeds(prompts)
    plain, directed = ((vectors[0] * texts).sum(1) for texts in (vectors[1], direction.guide(vectors[1])))
    assert directed.mean() > plain.mean() + 0.02
    assert -direction.loss == pytest.approx(float(directed.mean()), abs=1e-5)
    assert (directed > (vectors[0].roll(1, 0) * direction.guide(vectors[1])).sum(1)).float().mean() > 0.7
    scores = DirectionalReward(reward, direction)(files[:3], prompts[:3])
    np.testing.assert_allclose(scores, directed[:3].detach(), atol=1e-5)
