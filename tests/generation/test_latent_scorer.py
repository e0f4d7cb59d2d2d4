"""The head on estimated latents: its regression against refits by hand, and that it is used for nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.kernel_ridge import KernelRidge
from torch import Tensor
from torch.nn.functional import interpolate

from generation import load_pipeline, tiny_pipeline
from generation.best_of_n import best_of_n
from generation.drawing import borrowed, plan_requests, sampling_options
from generation.latent_scorer import (
    LatentScorer,
    RidgeHead,
    fit_latent_scorer,
    fit_ridge_head,
    latent_features,
    prompt_vector,
)
from generation.partial_runs import PartialRuns, Unfinished
from generation.tiny import TINY_FAMILIES
from mmalign.errors import InputError

PROMPTS = ["a red fox", "two boats on a lake", "a city at night"]


def redness(images: Sequence[Tensor], prompts: Sequence[str]) -> list[float]:
    return [float(image[0].mean()) for image in images]


def blueness(images: Sequence[Tensor], prompts: Sequence[str]) -> list[float]:
    return [float(image[2].mean()) for image in images]


def world(prompts: int, each: int, noise: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features, prompts, groups, and scores of which a part turns with the prompt; every prompt has its own level."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.arange(prompts).repeat_interleave(each)
    features = torch.randn(len(groups), 6, generator=generator) * 3 + 5
    vectors = torch.randn(prompts, 2, generator=generator) + 1
    texts = torch.nn.functional.normalize(vectors - vectors.mean(0), dim=1)
    scores = features[:, 0] + features[:, 1] * texts[groups, 0] + 40 * torch.randn(prompts, generator=generator)[groups]
    return features, vectors, groups, scores + noise * torch.randn(len(groups), generator=generator)


def predicted(head: RidgeHead, features: Tensor, vectors: Tensor) -> Tensor:
    texts = torch.nn.functional.normalize(vectors - head.text_mean, dim=1)
    texts = torch.cat([torch.ones(len(texts), 1), texts], dim=1)
    return head.offset + torch.einsum("nd,dt,nt->n", (features - head.mean) / head.std, head.weights, texts)


def within(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    return values - np.stack([values[groups == group].mean(axis=0) for group in groups])


@pytest.mark.parametrize(("prompts", "each", "noise"), [(5, 6, 2.0), (8, 4, 20.0), (1, 12, 1.0)])
def test_is_ridge_regression_with_each_prompt_left_out_by_hand(prompts: int, each: int, noise: float) -> None:
    features, vectors, groups, scores = world(prompts, each, noise)
    head = fit_ridge_head(features, vectors, groups, scores)

    group = groups.numpy()
    x = within(((features - features.mean(0)) / features.std(0)).double().numpy(), group)
    y = within(scores.double().numpy(), group)
    y = y / np.sqrt((y**2).mean())
    centred = (vectors - vectors.mean(0)).double().numpy()
    t = (centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12))[group]
    folds = [group == one for one in np.unique(group)] if prompts > 1 else [*np.eye(each, dtype=bool)]
    fits, foreseen = [], []
    for use in (0, 1):
        kernel = x @ x.T / x.shape[1] * (1 + use * t @ t.T)
        for exponent in range(-4, 4):
            alpha = 10.0**exponent * np.diag(kernel).mean()
            guess = np.empty(len(y))
            for fold in folds:
                ridge = KernelRidge(alpha=alpha, kernel="precomputed").fit(kernel[~fold][:, ~fold], y[~fold])
                guess[fold] = ridge.predict(kernel[fold][:, ~fold])
            fits.append(KernelRidge(alpha=alpha, kernel="precomputed").fit(kernel, y).predict(kernel))
            foreseen.append(guess)
    errors = (np.array(foreseen) - y) ** 2
    best = fits[int(errors.sum(axis=1).argmin())]
    np.testing.assert_allclose(
        within(predicted(head, features, vectors[groups]).double().numpy(), group),
        best * np.sqrt((within(scores.double().numpy(), group) ** 2).mean()),
        atol=2e-4,
    )
    chosen = np.empty(len(y))
    for fold in folds:
        chosen[fold] = foreseen[int((errors.sum(axis=1) - errors[:, fold].sum(axis=1)).argmin())][fold]
    by_prompt = [spearmanr(chosen[group == one], y[group == one]).statistic for one in np.unique(group)]
    assert head.rank_correlation == pytest.approx(np.mean(by_prompt), abs=1e-6)


def test_finds_what_is_there_and_claims_no_more() -> None:
    features, vectors, groups, scores = world(12, 16, 0.5)
    head = fit_ridge_head(features, vectors, groups, scores)
    assert head.rank_correlation > 0.9
    fresh = torch.randn(200, 6, generator=torch.Generator().manual_seed(9)) * 3 + 5
    vector = vectors[:1].expand(200, -1)
    text = torch.nn.functional.normalize(vectors - vectors.mean(0), dim=1)[0, 0]
    assert spearmanr(predicted(head, fresh, vector), fresh[:, 0] + fresh[:, 1] * text).statistic > 0.95
    chance = fit_ridge_head(features, vectors, groups, torch.randn(len(scores), generator=torch.Generator()))
    assert abs(chance.rank_correlation) < 0.2


def test_scores_that_cannot_be_learnt_from_are_refused() -> None:
    features, vectors, groups, scores = world(3, 4, 1.0)
    with pytest.raises(InputError, match="a score is nan; give another reward"):
        fit_ridge_head(features, vectors, groups, torch.where(groups == 1, torch.nan, scores))
    with pytest.raises(InputError, match="gives all images of a prompt the same score"):
        fit_ridge_head(features, vectors, groups, groups.float())


def test_features_say_what_is_where() -> None:
    generator = torch.Generator().manual_seed(0)
    filters, biases = torch.randn(3, 2, 3, 3, generator=generator), torch.zeros(3)
    latents = torch.randn(2, 2, 8, 12, generator=generator)
    features = latent_features(latents.half(), filters, biases)
    assert features.dtype == torch.float32
    latents = latents.half().float()
    for row, latent in zip(features, latents, strict=True):
        corners = [latent[c, i : i + 4, j : j + 6].mean() for c in (0, 1) for i in (0, 4) for j in (0, 6)]
        parts = [*corners, latent[0].std(), latent[1].std()]
        for scale in (1, 2):
            small = latent.unfold(1, scale, scale).unfold(2, scale, scale).mean(dim=(3, 4))
            padded = torch.nn.functional.pad(small, (1, 1, 1, 1))
            windows = padded.unfold(1, 3, 1).unfold(2, 3, 1)
            parts += [*torch.einsum("cijhw,fchw->fij", windows, filters).clamp(min=0).mean(dim=(1, 2))]
        torch.testing.assert_close(row, torch.stack(parts), atol=1e-4, rtol=1e-4)


# -- on pipelines ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain_vae() -> Any:
    """A tiny SDXL whose VAE shows three channels of its latents as colors, so that a reward can be told from them."""
    pipeline = tiny_pipeline("sdxl")

    def decode(latents: Tensor, return_dict: bool = True, generator: Any = None) -> tuple[Tensor]:
        return (interpolate(latents[:, :3] / 8, scale_factor=8).tanh(),)

    pipeline.vae.decode = decode
    return pipeline


@pytest.fixture(scope="module")
def scorer(plain_vae: Any) -> LatentScorer:
    return fit_latent_scorer(plain_vae, redness, PROMPTS, images_per_prompt=12, steps=5, seed=50, batch_size=12)


def test_foresees_a_reward_of_images_never_seen(plain_vae: Any, scorer: LatentScorer) -> None:
    assert scorer.rank_correlation > 0.8
    assert (scorer.images, scorer.prompts, scorer.check_at) == (36, 3, 0.4)
    options = {"reward": redness, "model": plain_vae, "steps": 5, "seed": 900, "survivors": 12, "n": 12}
    found = best_of_n("a bowl of fruit", scorer=scorer, batch_size=12, **options)
    assert found.rank_correlation is not None
    assert found.rank_correlation > 0.8

    with borrowed(plain_vae):
        sampling = sampling_options(plain_vae, steps=5)
        requests = plan_requests("a bowl of fruit", images_per_prompt=12, seed=900)
        runs = PartialRuns(plain_vae, sampling, requests[0])
        _, estimates = runs.advance([Unfinished(request) for request in requests], 2)
    vector = prompt_vector(plain_vae, "a bowl of fruit")
    head = RidgeHead(scorer.mean, scorer.std, scorer.text_mean, scorer.weights, scorer.offset, scorer.rank_correlation)
    wanted = predicted(head, latent_features(estimates, scorer.filters, scorer.biases), vector.expand(12, -1))
    assert [one.early[0] for one in found.candidates] == pytest.approx(wanted.tolist(), abs=1e-5)
    scores = [one.score for one in found.candidates]
    assert np.mean(scores) == pytest.approx(scorer.offset, abs=0.2)  # in the reward's units


def test_a_file_is_the_scorer(scorer: LatentScorer, tmp_path: Path) -> None:
    file = scorer.save(tmp_path / "heads" / "redness.safetensors")
    again = LatentScorer.load(file)
    assert again.to_dict() == scorer.to_dict()
    latents, vectors = torch.randn(3, 4, 8, 8), torch.randn(3, len(scorer.text_mean))
    assert torch.equal(again.score(latents, vectors), scorer.score(latents, vectors))
    again.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()

    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:-100])
    for name, message in (("cut", "cannot be read"), ("absent", "cannot be read")):
        with pytest.raises(InputError, match=message):
            LatentScorer.load(tmp_path / f"{name}.safetensors")
    from safetensors.torch import save_file

    save_file({"b": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="holds no latent scorer"):
        LatentScorer.load(tmp_path / "other.safetensors")
    save_file({"b": torch.zeros(2)}, tmp_path / "less.safetensors", {"format": "mmalign latent scorer 1"})
    with pytest.raises(InputError, match=r"less\.safetensors' is damaged"):
        LatentScorer.load(tmp_path / "less.safetensors")


def test_is_used_for_what_it_was_fitted_to_alone(plain_vae: Any, scorer: LatentScorer) -> None:
    def use(model: Any = plain_vae, reward: Any = redness, **options: Any) -> None:
        best_of_n("a", model=model, reward=reward, scorer=scorer, n=2, steps=5, seed=0, **options)

    use()
    other = tiny_pipeline("sdxl", seed=1)
    with pytest.raises(InputError, match="fitted to a model of another text_encoder and text_encoder_2 and unet"):
        use(other)
    rescheduled = tiny_pipeline("sdxl")
    rescheduled.scheduler = type(rescheduled.scheduler).from_config(
        rescheduled.scheduler.config, timestep_spacing="trailing"
    )
    with pytest.raises(InputError, match="another scheduler; fit another by fit_latent_scorer"):
        use(rescheduled)
    with pytest.raises(InputError, match="another reward than blueness, redness"):
        use(reward=blueness)
    with pytest.raises(InputError, match=r"fitted to check_at 0\.4 and the check is at 0\.6; give check_at 0\.4"):
        use(check_at=0.6)
    with pytest.raises(InputError, match=r"the check is at 0\.4, 0\.8"):
        use(check_at=[0.4, 0.8])
    with pytest.raises(InputError, match="fitted to images of 64 x 64 and these are 64 x 80"):
        use(height=80)


@pytest.mark.parametrize("family", [family for family in TINY_FAMILIES if family != "sdxl"])
def test_every_other_family(family: str) -> None:
    pipeline = load_pipeline(f"tiny:{family}", device="cpu")
    options = {"images_per_prompt": 4, "steps": 2, "check_at": 0.5, "batch_size": 8}
    made = fit_latent_scorer(pipeline, redness, ["a dog", "a cat"], **options)
    if family == "flux":
        again = fit_latent_scorer(pipeline, redness, ["a dog", "a cat"], **options)
        assert torch.equal(made.weights, again.weights)
    vectors = torch.stack([prompt_vector(pipeline, text) for text in ("a dog", "a cat")])
    assert vectors.shape == (2, len(made.text_mean))
    assert not torch.allclose(vectors[0], vectors[1])
    found = best_of_n("a dog", model=pipeline, reward=redness, scorer=made, n=3, steps=2, check_at=0.5, seed=1)
    assert len({one.early for one in found.candidates}) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images_per_prompt": 3}, "images_per_prompt is 3; give 4 or more"),
        ({"check_at": 1}, "check_at is 1; give a share"),
        ({"prompts": []}, "there is no prompt"),
        ({"reward": "redness"}, "is no reward"),
        ({"reward": lambda images, prompts: [float("inf")] * len(images)}, "a score is inf"),
    ],
)
def test_what_cannot_be_used_is_refused(plain_vae: Any, options: dict[str, Any], message: str) -> None:
    given = {"reward": redness, "prompts": ["a"], "steps": 2, "images_per_prompt": 4, **options}
    with pytest.raises(InputError, match=message):
        fit_latent_scorer(plain_vae, **given)
