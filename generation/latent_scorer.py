"""A small head that tells from an unfinished image's estimated latents how a reward will score it when finished.

For the checks of `best_of_n`, where it takes the place of decoding and of the reward. NoisyCLIP (arXiv 2512.08505)
fine-tunes a whole image tower on noisy latents; this head is much less (ours): ridge regression, in closed form, from
fixed features of the one-step estimate of x_0, times the prompt's vector, to the reward. A few hundred images fit it.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, conv2d, normalize

from mmalign.checks import at_least
from mmalign.errors import InputError, reason_of
from mmalign.files import load_tensors, save_tensors, whole_file
from mmalign.progress import progress_bar

from .drawing import SamplingOptions, borrowed, plan_requests, sampling_options
from .latents import unpacked
from .partial_runs import PartialRuns, Unfinished, check_step
from .pipelines import load_pipeline, pipeline_fingerprints, quiet_diffusers
from .rewards import AnyReward, Reward, as_reward

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from typing_extensions import Self

__all__ = ["LatentScorer", "RidgeHead", "fit_latent_scorer", "fit_ridge_head", "latent_features", "prompt_vector"]

_FORMAT = "mmalign latent scorer 1"
_TENSORS = ("filters", "biases", "mean", "std", "text_mean", "weights")
_FILTERS = 64
_PENALTIES = 10.0 ** torch.arange(-4, 4, dtype=torch.float64)
_BATCH_SIZE = 4


@dataclass(frozen=True, eq=False)
class LatentScorer:
    """The head, and what it is of. It ranks the images of one prompt; across prompts its scores do not compare.

    Attributes:
        filters: of `latent_features`.
        biases: likewise.
        mean: of features, over the images that it was fitted to.
        std: likewise.
        text_mean: of the prompts' vectors.
        weights: the score is offset + x . weights (1, t), of standardised features x and t = normalize(vector - mean).
        offset: mean score.
        check_at: share of the steps after which the estimates were taken.
        height: of the images, in pixels.
        width: likewise.
        rank_correlation: Spearman's between head and reward within a prompt, mean over prompts, each of which was
            scored by a head fitted without it (without the image, where there was only one prompt).
        images: how many it was fitted to.
        prompts: how many.
        fingerprints: of the model, see `pipeline_fingerprints`.
        reward: name.
        reward_fingerprint: of the reward, where it has one.
        settings: steps and guidance_scale of the images; another guidance shifts what the head sees.
    """

    filters: Float[Tensor, "count channels 3 3"]
    biases: Float[Tensor, " count"]
    mean: Float[Tensor, " dim"]
    std: Float[Tensor, " dim"]
    text_mean: Float[Tensor, " text_dim"]
    weights: Float[Tensor, "dim 1+text_dim"]
    offset: float
    check_at: float
    height: int
    width: int
    rank_correlation: float
    images: int
    prompts: int
    fingerprints: dict[str, str]
    reward: str
    reward_fingerprint: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def score(
        self, latents: Float[Tensor, "n channels h w"], vectors: Float[Tensor, "n text_dim"]
    ) -> Float[Tensor, " n"]:
        """Scores of estimated latents, each with its `prompt_vector`, in the reward's units; on the CPU."""
        features = (latent_features(latents, self.filters, self.biases) - self.mean) / self.std
        return self.offset + (features * (_with_one(vectors, self.text_mean) @ self.weights.T)).sum(dim=1)

    def on(self, pipeline: DiffusionPipeline) -> Callable[[Tensor, Sequence[str]], Tensor]:
        """A function of estimated latents and a prompt for each, which the pipeline's text encoders make vectors of."""
        known: dict[str, Tensor] = {}

        def score(latents: Tensor, prompts: Sequence[str]) -> Tensor:
            for prompt in {*prompts} - {*known}:
                known[prompt] = prompt_vector(pipeline, prompt)
            return self.score(latents, torch.stack([known[prompt] for prompt in prompts]))

        return score

    def refuse_other(
        self, fingerprints: dict[str, str], reward: Reward, check_at: Sequence[float], options: SamplingOptions
    ) -> None:
        """See that it is used for what it was fitted to. Adapters on the model are not looked at.

        Raises:
            InputError: the model, its scheduler, the reward, the size or the checks are others.
        """
        others = sorted(name for name, known in self.fingerprints.items() if fingerprints.get(name) != known)
        remedy = "fit another by fit_latent_scorer"
        if others:
            raise InputError(f"the scorer was fitted to a model of another {' and '.join(others)}; {remedy}")
        if (self.reward, self.reward_fingerprint) != (reward.name, reward.fingerprint):
            raise InputError(f"the scorer was fitted to another reward than {reward.name}, {self.reward}; {remedy}")
        if list(check_at) != [self.check_at]:
            raise InputError(
                f"the scorer was fitted to check_at {self.check_at:g} and the check is at "
                f"{', '.join(f'{share:g}' for share in check_at) or None}; give check_at {self.check_at:g}, or {remedy}"
            )
        if (self.height, self.width) != (options.height, options.width):
            raise InputError(
                f"the scorer was fitted to images of {self.width} x {self.height} and these are {options.width} x "
                f"{options.height}; give that size, or {remedy}"
            )

    def to_dict(self) -> dict[str, Any]:
        """All but the tensors, JSON-safe."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name not in _TENSORS}

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one safetensors file, with `to_dict` in its metadata.

        Raises:
            InputError: it cannot be written.
        """
        about = {"format": _FORMAT, "scorer": json.dumps(self.to_dict(), sort_keys=True)}
        with whole_file(path) as fresh:
            save_tensors({name: getattr(self, name) for name in _TENSORS}, fresh, about)
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote.

        Raises:
            InputError: there is no such file, or it is damaged or another one.
        """
        name = os.fspath(path)
        tensors, about = load_tensors(path, _FORMAT, "fit it again")
        try:
            values: dict[str, Any] = {**{key: tensors[key] for key in _TENSORS}, **json.loads(about["scorer"])}
            return cls(**values)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"scorer {name!r} is damaged ({reason_of(error)}); fit it again") from None


def fit_latent_scorer(
    model: str | os.PathLike[str] | DiffusionPipeline,
    reward: AnyReward,
    prompts: Sequence[str],
    *,
    check_at: float = 0.4,
    images_per_prompt: int = 16,
    steps: int | None = None,
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    batch_size: int | None = None,
    progress: bool = False,
) -> LatentScorer:
    """Draw images of prompts, and fit a head that foresees their scores from what they were after a share of the steps.

    Args:
        model: whatever `load_pipeline` takes.
        reward: what `as_reward` takes; it needs no gradient.
        prompts: like those that the head will be used for, better many of them than many images of each.
        check_at: share of the steps, as it will be given to `best_of_n`.
        images_per_prompt: 4 at least; all are drawn to the end.
        steps: see `generate`, as with the next three.
        guidance_scale: see `generate`.
        height: see `generate`.
        width: see `generate`.
        seed: of the first image; those that follow add 1 each.
        device: see `load_pipeline`.
        dtype: see `load_pipeline`.
        batch_size: images denoised together, 4 by default.
        progress: show a bar on standard error.

    Raises:
        InputError: an argument that cannot be used, a reward that tells no images of a prompt apart, or a score that
            is no finite number.
    """
    at_least("images_per_prompt", images_per_prompt, 4)
    at_least("batch_size", batch_size)
    requests = plan_requests(prompts, images_per_prompt=images_per_prompt, seed=seed)
    judge, size = as_reward(reward), int(batch_size or _BATCH_SIZE)
    pipeline = load_pipeline(model, device=device, dtype=dtype)
    if pipeline is not model:
        pipeline.vae.enable_slicing()
    options = sampling_options(pipeline, steps=steps, guidance_scale=guidance_scale, height=height, width=width)
    features: list[Tensor] = []
    scores: list[float] = []
    filters = biases = torch.empty(0)
    with ExitStack() as stack:
        stack.enter_context(borrowed(pipeline))
        advance = stack.enter_context(progress_bar("drawing images to learn from", len(requests), enabled=progress))
        runs = PartialRuns(pipeline, options, requests[0])
        step = check_step(check_at, runs.total)
        for start in range(0, len(requests), size):
            batch = requests[start : start + size]
            halfway, estimates = runs.advance([Unfinished(request) for request in batch], step)
            latents = unpacked(pipeline, estimates, height=options.height, width=options.width)
            if not len(filters):
                filters, biases = _random_filters(latents.shape[1])
            features.append(latent_features(latents, filters, biases))
            scores += judge(runs.finish(halfway), [request.prompt for request in batch]).tolist()
            advance(len(batch))
        texts = list(dict.fromkeys(request.prompt for request in requests))
        vectors = torch.stack([prompt_vector(pipeline, text) for text in texts])
    groups = torch.tensor([texts.index(request.prompt) for request in requests])
    head = fit_ridge_head(torch.cat(features), vectors, groups, torch.tensor(scores))
    return LatentScorer(
        filters=filters,
        biases=biases,
        **head._asdict(),
        check_at=float(check_at),
        height=options.height,
        width=options.width,
        images=len(requests),
        prompts=len(texts),
        fingerprints=pipeline_fingerprints(pipeline),
        reward=judge.name,
        reward_fingerprint=judge.fingerprint,
        settings={"steps": options.steps, "guidance_scale": options.guidance_scale},
    )


class RidgeHead(NamedTuple):
    """See the attributes of `LatentScorer`."""

    mean: Float[Tensor, " dim"]
    std: Float[Tensor, " dim"]
    text_mean: Float[Tensor, " text_dim"]
    weights: Float[Tensor, "dim 1+text_dim"]
    offset: float
    rank_correlation: float


def fit_ridge_head(
    features: Float[Tensor, "n dim"],
    vectors: Float[Tensor, "prompts text_dim"],
    groups: Int[Tensor, " n"],
    scores: Float[Tensor, " n"],
) -> RidgeHead:
    """Ridge regression of scores on features x (1, t), within prompts: of both the mean of each prompt is taken off.

    Penalty, and whether the prompt's vector t counts, are those with the least error when each prompt in turn is left
    out (each image, where there is one prompt). With G = (K + penalty)^-1 and a = G y the error of a left out block B
    is G_BB^-1 a_B, so one inverse serves all.

    Args:
        features: of images.
        vectors: of prompts.
        groups: the prompt of each image, from 0.
        scores: of each image.

    Raises:
        InputError: a score that is not finite, or no two that differ within a prompt.
    """
    if not scores.isfinite().all():
        raise InputError(f"a score is {scores[~scores.isfinite()][0]:g}; give another reward, or dtype float32")
    mean, std = features.mean(dim=0), features.std(dim=0).clamp(min=1e-6)
    rows, y = (_centred(values.double(), groups) for values in ((features - mean) / std, scores[:, None]))
    y = y[:, 0]
    if not (scale := y.square().mean().sqrt()) > 1e-12:
        raise InputError("the reward gives all images of a prompt the same score; give one that tells them apart")
    y = y / scale
    text_mean = vectors.mean(dim=0)
    texts = _with_one(vectors, text_mean).double()[groups]
    images = rows @ rows.T / rows.shape[1]
    blocks = [(groups == group).nonzero()[:, 0] for group in groups.unique()]
    if len(blocks) == 1:
        blocks = [*torch.arange(len(y))[:, None]]
    tried = []  # the weight of t, what solves for it, its errors
    for use in (0.0, 1.0) if len(vectors) > 1 else (0.0,):
        kernel = images * (1 + use * texts[:, 1:] @ texts[:, 1:].T)
        for penalty in _PENALTIES * kernel.diagonal().mean():
            inverse = torch.linalg.inv(kernel + penalty * torch.eye(len(y), dtype=torch.float64))
            dual, errors = inverse @ y, torch.empty_like(y)
            for block in blocks:
                errors[block] = torch.linalg.solve(inverse[block][:, block], dual[block])
            tried.append((use, dual, errors))
    squares = torch.stack([errors.square() for *_, errors in tried])
    use, dual, _ = tried[int(squares.sum(dim=1).argmin())]
    foreseen = torch.empty_like(y)
    for block in blocks:  # penalties, too, are chosen without the block
        others = squares.sum(dim=1) - squares[:, block].sum(dim=1)
        foreseen[block] = (y - tried[int(others.argmin())][2])[block]
    texts[:, 1:] *= use
    weights = scale * rows.T @ (dual[:, None] * texts) / rows.shape[1]
    correlation = _mean_correlation(foreseen, y, groups)
    return RidgeHead(mean, std, text_mean, weights.float(), float(scores.mean()), correlation)


def latent_features(
    latents: Float[Tensor, "n channels h w"],
    filters: Float[Tensor, "count channels 3 3"],
    biases: Float[Tensor, " count"],
) -> Float[Tensor, "n dim"]:
    """What is where (2 x 2 means), how much of it (deviations), and texture: mean ReLU of fixed filters at two scales.

    float32, on the CPU.
    """
    latents = latents.float().cpu()
    parts = [adaptive_avg_pool2d(latents, 2).flatten(1), latents.flatten(2).std(dim=2)]
    for scaled in (latents, avg_pool2d(latents, 2)):
        parts.append(conv2d(scaled, filters, biases, padding=1).relu().mean(dim=(2, 3)))
    return torch.cat(parts, dim=1)


@torch.no_grad()
def prompt_vector(pipeline: DiffusionPipeline, prompt: str) -> Float[Tensor, " text_dim"]:
    """The mean of the embeddings that a pipeline of any family asks its denoiser with; float32, on the CPU."""
    wanted = {
        "prompt": prompt,
        "prompt_2": None,
        "prompt_3": None,
        "device": pipeline.device,
        "num_images_per_prompt": 1,
        "do_classifier_free_guidance": False,
    }
    known = inspect.signature(pipeline.encode_prompt).parameters
    with quiet_diffusers():
        embeds = pipeline.encode_prompt(**{name: value for name, value in wanted.items() if name in known})[0]
    return embeds[0].float().mean(dim=0).cpu()


def _random_filters(channels: int) -> tuple[Float[Tensor, "count channels 3 3"], Float[Tensor, " count"]]:
    generator = torch.Generator().manual_seed(0)
    filters = torch.randn(_FILTERS, channels, 3, 3, generator=generator) / (9 * channels) ** 0.5
    return filters, torch.randn(_FILTERS, generator=generator) / 2


def _with_one(vectors: Float[Tensor, "n text_dim"], mean: Float[Tensor, " text_dim"]) -> Float[Tensor, "n 1+text_dim"]:
    texts = normalize(vectors - mean, dim=1)
    return torch.cat([torch.ones_like(texts[:, :1]), texts], dim=1)


def _centred(values: Float[Tensor, "n dim"], groups: Int[Tensor, " n"]) -> Float[Tensor, "n dim"]:
    sums = torch.zeros(int(groups.max()) + 1, values.shape[1]).to(values).index_add_(0, groups, values)
    return values - (sums / torch.bincount(groups)[:, None])[groups]


def _mean_correlation(foreseen: Float[Tensor, " n"], scores: Float[Tensor, " n"], groups: Int[Tensor, " n"]) -> float:
    """Spearman's within prompts; 0 where one side of a prompt is constant."""
    from scipy.stats import spearmanr

    found = []
    for group in groups.unique():
        sides = foreseen[groups == group], scores[groups == group]
        varied = min(len(side.unique()) for side in sides) > 1
        found.append(float(spearmanr(*sides).statistic) if varied else 0.0)
    return sum(found) / len(found)
