"""Best of N: what is kept is what `generate` draws, what is dropped scored worst, and what was asked is counted."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from generation import CosineReward, GeneratedImage, generate, load_pipeline, read_settings
from generation.best_of_n import BestOfN, Candidate, best_of_n, rank_correlation
from generation.prompt_revision import RevisionRequest, emphasise_misaligned, misaligned_words
from generation.rewards import as_reward
from generation.rewards.jpeg_size import JPEGSize
from generation.rewards.word_influence import word_influence
from generation.sampling import generate_again
from generation.tiny import TINY_FAMILIES
from mmalign import Encoder
from mmalign.errors import InputError
from mmalign.word_attribution import word_attribution

PROMPT = "a red fox in deep snow"


def redness(images: Sequence[Tensor], prompts: Sequence[str]) -> list[float]:
    return [float(image[0].mean() - image[1:].mean()) for image in images]


def pixels(image: GeneratedImage) -> np.ndarray:
    return np.asarray(image.image, dtype=np.int16)


def run(model: Any, **options: Any) -> BestOfN:
    given = {"reward": redness, "n": 6, "steps": 5, "seed": 3, **options}
    return best_of_n(PROMPT, model=model, **given)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_in_batches_of_equal_make_up_images_are_those_of_generate_bit_by_bit(family: str) -> None:
    pipeline = load_pipeline(f"tiny:{family}", device="cpu")
    found = run(pipeline, n=3, keep=3, check_at=[0.3, 0.7], survivors=[3, 3], batch_size=3, steps=4)
    wanted = generate(PROMPT, model=pipeline, images_per_prompt=3, steps=4, seed=3, batch_size=3)
    by_seed = {image.seed: image for image in found.images}
    assert found.saved == 0
    assert len(by_seed) == 3
    for image in wanted:
        np.testing.assert_array_equal(pixels(by_seed[image.seed]), pixels(image))
        assert by_seed[image.seed].settings == image.settings
    scores = dict(zip([image.seed for image in wanted], as_reward(redness)(wanted, PROMPT), strict=True))
    assert found.scores == pytest.approx(sorted(scores.values(), reverse=True))
    assert [image.seed for image in found.images] == sorted(scores, key=lambda seed: -scores[seed])


@pytest.mark.parametrize(
    ("family", "scheduler"),
    [
        ("flux", None),  # packs its latents
        ("sd15", None),  # has PNDM, which goes to a timestep twice
        ("sdxl", "DPMSolverMultistepScheduler"),  # remembers predictions
        ("sdxl", "EulerAncestralDiscreteScheduler"),  # draws noise on the way
        ("sdxl", "HeunDiscreteScheduler"),  # nearly twice as many steps
    ],
)
def test_after_others_were_dropped_images_are_those_of_generate(family: str, scheduler: str | None) -> None:
    pipeline = load_pipeline(f"tiny:{family}", device="cpu")
    if scheduler is not None:
        pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config)
    found = run(pipeline, n=5, keep=2, check_at=[0.2, 0.6], survivors=[4, 2], batch_size=3)
    assert found.steps == {"HeunDiscreteScheduler": 9, None: 5 + (family == "sd15")}.get(scheduler, 5)
    wanted = generate(PROMPT, model=pipeline, images_per_prompt=2, steps=5, seed=[image.seed for image in found.images])
    for image, same in zip(found.images, wanted, strict=True):
        np.testing.assert_allclose(pixels(image), pixels(same), atol=1)  # another batch size rounds otherwise
    others = {one.seed for one in found.candidates} - {image.seed for image in found.images}
    assert others
    (other,) = generate(PROMPT, model=pipeline, steps=5, seed=min(others))
    assert np.abs(pixels(found.images[0]) - pixels(other)).mean() > 2


def corner(images: Sequence[Tensor], prompts: Sequence[str]) -> list[float]:
    return [float(image[0, 5, 5]) for image in images]


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux"])
def test_early_scores_are_of_the_one_step_estimate(family: str) -> None:
    """By hand, from the plain pipeline's latents and what its network said: x - sigma times a part of the guidance."""
    pipeline = load_pipeline(f"tiny:{family}", device="cpu")
    found = run(pipeline, reward=corner, n=3, check_at=0.4, survivors=3)
    latents: list[Tensor] = []
    said: list[Tensor] = []

    def keep(_: Any, step: int, time: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        latents.append(tensors["latents"])
        return tensors

    network = pipeline.unet if family == "sdxl" else pipeline.transformer
    network.register_forward_hook(lambda module, inputs, output: said.append(output[0]))
    pipeline.set_progress_bar_config(disable=True)
    pipeline(
        [PROMPT] * 3,
        num_inference_steps=5,
        generator=[torch.Generator().manual_seed(seed) for seed in (3, 4, 5)],
        height=64,
        width=64,
        callback_on_step_end=keep,
        output_type="latent",
    )

    def scored(guidance: float) -> list[float]:
        prediction = said[1]
        if family != "flux":
            unconditional, conditional = prediction.chunk(2)
            scale = {"sdxl": 5.0, "sd3": 7.0}[family]
            guided = unconditional + scale * (conditional - unconditional)
            prediction = conditional + guidance * (guided - conditional)
        estimate = latents[0] - pipeline.scheduler.sigmas[1] * prediction
        if family == "flux":
            estimate = pipeline._unpack_latents(estimate, 64, 64, pipeline.vae_scale_factor)
        config = pipeline.vae.config
        with torch.no_grad():
            decoded = pipeline.vae.decode(estimate / config.scaling_factor + (config.shift_factor or 0)).sample
        return corner([*(decoded / 2 + 0.5).clamp(0, 1)], [])

    early = [one.early[0] for one in found.candidates]
    assert early == pytest.approx(scored(0.4), abs=5e-5)
    for other in [scored(1.0)] * (family != "flux") + [[one.score for one in found.candidates]]:
        assert np.abs(np.subtract(early, other)).max() > 1e-3


def test_the_worst_of_all_batches_are_dropped_at_each_check(tiny_sdxl: Any) -> None:
    found = run(tiny_sdxl, n=9, keep=2, check_at=[0.2, 0.5, 0.8], survivors=[6, 4, 2], batch_size=2, steps=10)
    assert found.checks == (2, 5, 8)
    alive = found.candidates
    assert [one.seed for one in alive] == list(range(3, 12))
    for check, count in enumerate([6, 4, 2]):
        assert all(len(one.early) > check for one in alive)
        kept = [one for one in alive if len(one.early) > check + 1 or one.score is not None]
        dropped = [one for one in alive if one not in kept]
        assert len(kept) == count
        assert min(one.early[check] for one in kept) > max(one.early[check] for one in dropped)
        alive = kept
    assert sorted((one.score for one in alive), reverse=True) == found.scores


@pytest.mark.parametrize(("family", "rows"), [("sdxl", 2), ("flux", 1)])
def test_calls_are_those_of_the_denoiser(family: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = load_pipeline(f"tiny:{family}", device="cpu")
    asked: list[int] = []
    first = pipeline.unet.conv_in if family == "sdxl" else pipeline.transformer.x_embedder
    first.register_forward_hook(lambda module, inputs, output: asked.append(len(inputs[0])))
    found = best_of_n(PROMPT, reward=redness, model=pipeline, steps=5, seed=0)
    assert found.calls == sum(asked) == rows * (16 * 2 + 4 * 3)
    asked.clear()
    plain = best_of_n(PROMPT, reward=redness, model=pipeline, steps=5, seed=0, check_at=None)
    assert found.plain_calls == plain.plain_calls == plain.calls == sum(asked) == rows * 16 * 5
    assert found.saved >= 0.4
    assert found.saved == pytest.approx(0.45)
    assert plain.saved == 0
    assert plain.rank_correlation is None
    assert all(one.early == () for one in plain.candidates)
    assert plain.scores[0] == max(one.score for one in plain.candidates if one.score is not None)


def test_equal_scores_rank_by_seed(tiny_sdxl: Any) -> None:
    found = run(tiny_sdxl, n=5, keep=2, reward=lambda images, prompts: [0.5] * len(images), seed=[9, 4, 7, 5, 8])
    assert [image.seed for image in found.images] == [4, 5]
    assert [one.seed for one in found.candidates] == [9, 4, 7, 5, 8]
    assert [one.score for one in found.candidates] == [None, 0.5, None, 0.5, None]


def test_any_reward_sees_a_batch_at_most(tiny_sdxl: Any) -> None:
    seen: list[list[tuple[int, ...]]] = []

    def record(images: Sequence[Tensor], prompts: Sequence[str]) -> list[float]:
        assert not torch.is_grad_enabled()
        assert all(image.min() >= 0 and image.max() <= 1 for image in images)
        assert {*prompts} <= {PROMPT}
        seen.append([tuple(image.shape) for image in images])
        return redness(images, prompts)

    run(tiny_sdxl, reward=record, batch_size=4, preview_scale=2, survivors=3)
    assert seen == [[(3, 32, 32)] * 4, [(3, 32, 32)] * 2, [(3, 64, 64)] * 3]
    assert run(tiny_sdxl, reward=JPEGSize()).reward == "jpeg-compressibility"
    assert run(tiny_sdxl, reward=["jpeg-compressibility", "jpeg-incompressibility=2"], n=1).scores[0] > 0


def test_latents_are_scored_by_a_callable(tiny_sdxl: Any) -> None:
    seen: list[tuple[int, ...]] = []

    def brightness(latents: Tensor, prompts: Sequence[str]) -> Tensor:
        seen.append(tuple(latents.shape))
        return latents.mean(dim=(1, 2, 3))

    by_latents = run(tiny_sdxl, scorer=brightness, survivors=2)
    assert seen == [(4, 4, 8, 8), (2, 4, 8, 8)]
    by_reward = run(tiny_sdxl, survivors=2)
    assert [one.early for one in by_latents.candidates] != [one.early for one in by_reward.candidates]
    order = sorted(by_latents.candidates, key=lambda one: -one.early[0])
    assert {one.seed for one in order[:2]} == {one.seed for one in order if one.score is not None}
    packed = run(load_pipeline("tiny:flux", device="cpu"), scorer=brightness, preview_scale=2)
    assert seen[-1] == (2, 16, 8, 8)
    assert packed.images[0].image.size == (64, 64)


def test_everything_needed_to_draw_the_kept_again(tmp_path: Path) -> None:
    found = run("tiny:sdxl", n=3, keep=2, device="cpu", out=tmp_path / "best", negative_prompt="dull", survivors=2)
    assert [image.path.name for image in found.images if image.path] == [
        f"000{rank}-{image.seed}-a-red-fox-in-deep-snow.png" for rank, image in enumerate(found.images)
    ]
    for image in found.images:
        assert image.path is not None
        assert read_settings(image.path) == {"prompt": PROMPT, "seed": image.seed, **image.settings}
        np.testing.assert_allclose(pixels(generate_again(image.path)), pixels(image), atol=1)
    again = run("tiny:sdxl", n=3, keep=2, device="cpu", out=tmp_path / "best", negative_prompt="dull", survivors=2)
    assert [image.path for image in again.images] == [image.path for image in found.images]
    assert len(list((tmp_path / "best").iterdir())) == 2

    about = json.loads(json.dumps(found.to_dict()))
    assert [one["score"] for one in about["images"]] == found.scores
    assert [one["path"] for one in about["images"]] == [str(image.path) for image in found.images]
    assert len(about["candidates"]) == 3
    assert about["saved"] == found.saved
    sheet = Image.open(found.draw(tmp_path / "sheet.png"))
    assert sheet.width > 2 * 224


def test_a_pipeline_is_left_as_it_was(tiny_sd15: Any) -> None:
    scheduler, state = tiny_sd15.scheduler, json.dumps(vars(tiny_sd15.scheduler), default=repr)
    tiny_sd15.unet.train()
    run(tiny_sd15)
    assert tiny_sd15.unet.training
    tiny_sd15.unet.eval()
    assert tiny_sd15.scheduler is scheduler
    assert json.dumps(vars(scheduler), default=repr) == state
    assert "forward" not in vars(tiny_sd15.unet)
    assert not tiny_sd15.vae.use_slicing


def test_rank_correlation_is_of_the_finished() -> None:
    def result(*scores: tuple[float, float | None]) -> float | None:
        candidates = [Candidate(seed, 1, "", (9.0, early), final) for seed, (early, final) in enumerate(scores)]
        return BestOfN("", [], [], candidates, (1,), 2, 1, 2, [""], "").rank_correlation

    assert result((1, 0.0), (2, 0.5), (3, 0.2), (4, None)) == pytest.approx(0.5)
    assert result((1, 0.0), (2, 0.5), (4, None)) is None
    assert rank_correlation([(1.0, 2.0), (1.0, 3.0), (1.0, 4.0)]) is None
    assert rank_correlation([(0.0, 3.0), (-1.0, 5.0), (7.0, 1.0)]) == pytest.approx(-1)
    assert rank_correlation([]) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 7}, "keep is 7 of n 6"),
        ({"n": 0}, "n is 0"),
        ({"check_at": 0}, "check_at is 0; give a share of the steps between 0 and 1"),
        ({"check_at": 1.0}, r"check_at is 1\.0"),
        ({"check_at": math.nan}, "check_at is nan"),
        ({"check_at": "0.4"}, "check_at is '0.4'"),
        ({"check_at": [0.5, 0.2]}, "does not ascend"),
        ({"check_at": []}, "check_at is empty"),
        ({"check_at": [0.4, 0.45], "survivors": [4, 2]}, "names one twice"),
        ({"check_at": [0.2, 0.8], "survivors": 2}, "1 survivors for 2 checks"),
        ({"check_at": [0.2, 0.8], "survivors": [2, 3]}, "survivors is 3 of 2 that are left"),
        ({"keep": 3, "survivors": 2}, "survivors is 2; give 3 or more"),
        ({"check_at": None, "survivors": 2}, "but check_at is None"),
        ({"check_at": None, "scorer": redness}, "a scorer is given but check_at is None"),
        ({"scorer": 3}, "scorer 3 is no LatentScorer"),
        ({"steps": 1}, "nothing to check on the way of 1 step"),
        ({"preview_scale": 3}, "preview_scale 3 needs a height that is a multiple of 24, not 64"),
        ({"rounds": 2}, "rounds is 2 without revise"),
        ({"revise": emphasise_misaligned}, "revise is given but rounds is 1"),
        ({"rounds": 2, "revise": lambda request: 3}, "revise returned 3"),
        ({"seed": [1, 2, 3, 3, 4, 5]}, "some seeds are equal"),
        ({"reward": lambda images, prompts: [math.nan] * len(images)}, "seed 3 after 2 of 5 steps is nan"),
        (
            {"reward": lambda images, prompts: [math.nan] * len(images), "check_at": None},
            "seed 3 after 5 steps is nan; give another reward, or dtype float32",
        ),
        ({"scorer": lambda latents, prompts: [1.0]}, "returned 1 numbers for 4 images"),
        ({"negative_prompt": "dull", "guidance_scale": 1}, "negative_prompt has no effect at guidance_scale 1"),
    ],
)
def test_what_cannot_be_used_is_refused(tiny_sdxl: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(tiny_sdxl, **options)


def test_what_a_family_or_scheduler_cannot_do_is_refused(tiny_sdxl: Any) -> None:
    with pytest.raises(InputError, match="FLUX takes no negative prompt"):
        run(load_pipeline("tiny:flux", device="cpu"), negative_prompt="dull")
    with pytest.raises(InputError, match="is not one text"):
        best_of_n(["a", "b"], reward=redness, model=tiny_sdxl)  # type: ignore[arg-type]
    between = load_pipeline("tiny:sdxl", device="cpu")
    between.scheduler = diffusers.KDPM2DiscreteScheduler.from_config(between.scheduler.config)
    with pytest.raises(InputError, match="KDPM2DiscreteScheduler also asks between its noise levels"):
        run(between)
    assert run(between, check_at=None, n=1).images
    between.scheduler.noise_sampler = None
    with pytest.raises(InputError, match="draws noise for a batch as a whole"):
        run(between)


# -- rounds ------------------------------------------------------------------------------------------------------------


def test_rounds_draw_revised_prompts_and_score_the_original(tiny_sdxl: Any) -> None:
    requests: list[RevisionRequest] = []
    scored: set[str] = set()

    def reward(images: Sequence[Tensor], prompts: Sequence[str]) -> list[float]:
        scored.update(prompts)
        return redness(images, prompts)

    def revise(request: RevisionRequest) -> str | None:
        requests.append(request)
        return f"{request.prompt}, number {request.round}" if request.round < 3 else None

    def missing(image: Image.Image, prompt: str) -> list[tuple[str, float]]:
        return [(prompt, float(np.asarray(image).mean()))]

    found = run(tiny_sdxl, n=4, keep=3, survivors=3, rounds=5, revise=revise, misalignments=missing, reward=reward)
    assert scored == {PROMPT}
    assert found.prompts == [PROMPT, f"{PROMPT}, number 1", f"{PROMPT}, number 2"]
    assert [(one.seed, one.round, one.prompt) for one in found.candidates] == [
        (3 + place, 1 + place // 4, found.prompts[place // 4]) for place in range(12)
    ]
    assert found.plain_calls == 3 * 4 * 5 * 2
    best = sorted((one for one in found.candidates if one.score is not None), key=lambda one: -one.score)
    assert [image.seed for image in found.images] == [one.seed for one in best[:3]]
    assert len({image.prompt for image in found.images}) > 1
    for image in found.images:
        (same,) = generate(image.prompt, model=tiny_sdxl, seed=image.seed, steps=5)
        np.testing.assert_allclose(pixels(image), pixels(same), atol=1)

    for number, request in enumerate(requests):
        so_far = found.candidates[: 4 * (number + 1)]
        finished = [one for one in so_far if one.score is not None]
        assert request.round == number + 1
        assert (request.prompt, request.drawn) == (PROMPT, found.prompts[number])
        assert request.image.seed == max(finished, key=lambda one: one.score or 0).seed
        own = sorted((one.score for one in finished if one.round == request.round), reverse=True)
        assert request.scores == own
        assert request.words == [(PROMPT, float(np.asarray(request.image.image).mean()))]
    assert len(requests) == 3


def test_misaligned_words_of_the_rewards_encoder_or_by_leaving_them_out(
    tiny_open_clip: Encoder, bundled: Encoder, photos: Path
) -> None:
    image = Image.open(sorted(photos.glob("*.jpg"))[0]).convert("RGB")
    text = "a dog, asleep on grass"
    (attributed,) = word_attribution(tiny_open_clip, [image], text)
    wanted = [(word.word, word.score) for word in attributed.words if word.word != ","]
    assert misaligned_words(CosineReward(tiny_open_clip), image, text) == wanted
    reward = CosineReward(bundled)
    assert misaligned_words(reward, image, text) == [tuple(word) for word in word_influence(reward, image, text)]
    assert [word for word, _ in wanted] == [word for word, _ in misaligned_words(reward, image, text)]
    assert misaligned_words(reward, image, "dog") == []
    assert misaligned_words(JPEGSize(), image, text) == []


def test_words_that_are_missing_come_to_the_front() -> None:
    def request(words: list[tuple[str, float]], drawn: str = PROMPT) -> RevisionRequest:
        return RevisionRequest(PROMPT, drawn, 1, GeneratedImage(Image.new("RGB", (8, 8)), PROMPT, 0, {}), [1.0], words)

    words = [("a", -9.0), ("red", 0.3), ("fox", -0.1), ("in", 0.0), ("deep", 0.2), ("snow.", -0.5)]
    assert emphasise_misaligned(request(words)) == f"snow, fox: {PROMPT}"
    assert emphasise_misaligned(request(words), most=1) == f"snow: {PROMPT}"
    assert emphasise_misaligned(request(words, drawn=f"snow, fox: {PROMPT}")) is None
    assert emphasise_misaligned(request([("red", -0.2), ("fox", -0.2)])) is None
    assert emphasise_misaligned(request([])) is None


def test_rounds_with_the_librarys_own_revision(tiny_sdxl: Any, bundled: Encoder) -> None:
    found = run(tiny_sdxl, n=3, reward=CosineReward(bundled), rounds=2, revise=emphasise_misaligned)
    words = misaligned_words(CosineReward(bundled), _best_of_round(found, 1, tiny_sdxl).image, PROMPT)
    worst = min((entry for entry in words if entry[0] in ("red", "fox", "deep", "snow")), key=lambda entry: entry[1])
    assert found.prompts[1].startswith(worst[0])
    assert found.prompts[1].endswith(f": {PROMPT}")
    assert {one.prompt for one in found.candidates} == set(found.prompts)


def _best_of_round(found: BestOfN, number: int, model: Any) -> GeneratedImage:
    finished = [one for one in found.candidates if one.round == number and one.score is not None]
    best = max(finished, key=lambda one: one.score or 0)
    return generate(best.prompt, model=model, seed=best.seed, steps=5)[0]


def test_rounds_are_refused_where_no_word_can_be_emphasised() -> None:
    with pytest.raises(InputError, match="redness does not see the prompt"):
        best_of_n("a red fox", reward="redness", model="tiny:sdxl", n=4, steps=3, rounds=2, revise=emphasise_misaligned)
