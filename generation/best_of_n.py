"""The best of N images of a prompt, where most of the N are dropped long before they are finished.

After a share of the steps the one-step estimates of all images are scored, and only the best go on. The idea is that
of NoisyCLIP (arXiv 2512.08505), which halves the cost of best-of-N by scoring noisy latents with a tower trained for
it. Here any reward scores, either the estimates decoded to pixels, or by a head on the latents that
`generation.latent_scorer` fits to it.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.checks import at_least
from mmalign.errors import InputError
from mmalign.progress import Advance, progress_bar

from .adapters import adapters_applied, find_adapters
from .drawing import ImageRequest, SamplingOptions, borrowed, plan_requests, sampling_options
from .images import GeneratedImage, refuse_folder, saved_or_free
from .latent_scorer import LatentScorer
from .latents import unpacked
from .partial_runs import PartialRuns, Unfinished, check_step
from .pipelines import DEFAULT_MODEL, load_pipeline, pipeline_family
from .prompt_revision import Misalignments, Revise, RevisionRequest, emphasise_misaligned, misaligned_words
from .rewards import AnyReward, Reward, as_reward
from .sampling import drawn_with, model_name

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["BestOfN", "Candidate", "best_of_n"]

_BATCH_SIZE = 4

# Of estimated latents (n channels h w) and a prompt for each: a number for each.
Scorer: TypeAlias = "LatentScorer | Callable[[Tensor, Sequence[str]], Any]"


@dataclass(frozen=True, slots=True)
class Candidate:
    """One of the N.

    Attributes:
        seed: of its noise.
        round: from 1.
        prompt: that it was drawn with.
        early: its scores at the checks that it reached, in the order of the checks.
        score: of the finished image; `None` where it was dropped.
    """

    seed: int
    round: int
    prompt: str
    early: tuple[float, ...]
    score: float | None


@dataclass(frozen=True)
class BestOfN:
    """What `best_of_n` found.

    Attributes:
        prompt: the original one, of which all scores are.
        images: those kept, best first.
        scores: of these images.
        candidates: all, in the order of their seeds.
        checks: steps after which images were dropped, of the `steps` of a whole run.
        steps: see `checks`.
        calls: images that the denoiser was asked about, in all steps together; guidance asks about an image twice.
        plain_calls: the same without dropping any. Neither counts decoding and scoring at the checks, which takes
            one decoding and one score an image and check; with a scorer of latents, no decoding.
        prompts: of each round.
        reward: its name.
    """

    prompt: str
    images: list[GeneratedImage]
    scores: list[float]
    candidates: list[Candidate]
    checks: tuple[int, ...]
    steps: int
    calls: int
    plain_calls: int
    prompts: list[str]
    reward: str

    @property
    def saved(self) -> float:
        """Share of the denoiser's calls that dropping saved, in [0, 1)."""
        return 1 - self.calls / self.plain_calls

    @property
    def rank_correlation(self) -> float | None:
        """Spearman's, between the last early and the final score of the finished images; `None` below three.

        It is of those that were good early: among all N, which `scripts/bench_best_of_n.py` measures, it is another.
        With the 4 that finish of 16 by default it says next to nothing.
        """
        return rank_correlation(
            [(one.early[-1], one.score) for one in self.candidates if one.early and one.score is not None]
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON; images by path, seed and settings."""
        return {
            "prompt": self.prompt,
            "prompts": self.prompts,
            "reward": self.reward,
            "images": [
                {**image.to_dict(), "score": score} for image, score in zip(self.images, self.scores, strict=True)
            ],
            "candidates": [
                {"seed": one.seed, "round": one.round, "early": list(one.early), "score": one.score}
                for one in self.candidates
            ],
            "checks": list(self.checks),
            "steps": self.steps,
            "calls": self.calls,
            "plain_calls": self.plain_calls,
            "saved": self.saved,
            "rank_correlation": self.rank_correlation,
        }

    def draw(self, path: str | os.PathLike[str]) -> Path:
        """One picture of the images that were kept, with scores and seeds.

        Raises:
            InputError: it cannot be written.
        """
        from mmalign.imaging.contact_sheet import draw_contact_sheet

        cells = []
        for image, score in zip(self.images, self.scores, strict=True):
            lines = [f"{score:.4g}  seed {image.seed}"] + [image.prompt] * (image.prompt != self.prompt)
            cells.append((image.image, lines))
        return draw_contact_sheet([(self.prompt, cells)], path)


def best_of_n(
    prompt: str,
    *,
    reward: AnyReward | str | Sequence[str],
    n: int = 16,
    keep: int = 1,
    model: str | os.PathLike[str] | DiffusionPipeline = DEFAULT_MODEL,
    unet: str | os.PathLike[str] | None = None,
    adapter: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    adapter_weight: float | Sequence[float] = 1.0,
    check_at: float | Sequence[float] | None = 0.4,
    survivors: int | Sequence[int] | None = None,
    scorer: Scorer | None = None,
    preview_scale: int = 1,
    rounds: int = 1,
    revise: Revise | None = None,
    misalignments: Misalignments | None = None,
    negative_prompt: str | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    out: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    batch_size: int | None = None,
    seed: int | Sequence[int] | None = None,
    progress: bool = False,
) -> BestOfN:
    """Draw `n` images of a prompt and keep the best by a reward; images that look bad early are not finished.

    Those kept are what `generate(prompt, seed=...)` draws, to the rounding that another batch size brings. Latents of
    all candidates are kept at once, pixels only of a batch and of the best so far. Equal scores rank by seed.

    A check costs no denoiser call of its own: what is scored is the estimate of the finished image that the last step
    before it gives anyway. With the defaults, 16 images go 2/5 of the way and 4 of them all of it: 45 % fewer calls.
    That pays where early scores foresee final ones; where they do not, 9 images without a check are better for the
    same calls. `scripts/bench_best_of_n.py` tells for a model and a reward: for a trained miniature, checks at 0.4 were
    worth it by the size of the JPEG (Spearman 0.58), and by an encoder's cosine at no step (0.16, at 0.7 0.49).

    Args:
        prompt: one.
        reward: what `generation.rewards.as_reward` takes, or names for `load_rewards`. It needs no gradient.
        n: candidates, in each round.
        keep: how many to return, of all rounds.
        model: see `generate`, as with the next three.
        unet: see `generate`.
        adapter: see `generate`.
        adapter_weight: see `generate`.
        check_at: the share of the steps after which the worst are dropped, or several, ascending; `None` drops none.
        survivors: how many go on after each check; by default a quarter of `n`, but not less than `keep`, after the
            last one, in equal ratios before.
        scorer: of estimated latents, in place of the reward on decoded pixels: a `LatentScorer` for this model, reward
            and `check_at`, or a callable of latents (n channels h w) and prompts.
        preview_scale: 2 averages latents 2 x 2 before they are decoded for a check, a quarter of that work. Whether a
            VAE shows small what it shows large has to be tried: that of the tiny models, of random weights, does not.
        rounds: 2 and more draw `n` more images each, with the prompt that `revise` makes. Seeds count on.
        revise: takes a `RevisionRequest` and returns the next prompt, or `None` to end; for example
            `emphasise_misaligned`. Scores stay those of the original prompt.
        misalignments: takes an image (Pillow) and the prompt, returns words with their influence on the score, for
            `revise`; `misaligned_words` of the reward by default.
        negative_prompt: see `generate`, as with the next four.
        steps: see `generate`.
        guidance_scale: see `generate`.
        height: see `generate`.
        width: see `generate`.
        out: folder to save the kept images in, best first by name, with their settings.
        device: see `load_pipeline`; for a reward by name, too.
        dtype: see `load_pipeline`.
        batch_size: images denoised together, 4 by default.
        seed: of the first candidate; those that follow add 1 each. Or one for each, of all rounds. `None` draws one.
        progress: show a bar on standard error.

    Raises:
        InputError: an argument that cannot be used, or a score or an image that came out as NaN.
        ModelUnavailableError: the model, an adapter or a reward's weights are not to be had.
        EncoderUnavailableError: likewise, a reward's encoder.
    """
    if not isinstance(prompt, str):
        raise InputError(f"prompt {prompt!r} is not one text; give one, and call again for others")
    for name, value in (("n", n), ("keep", keep), ("rounds", rounds), ("preview_scale", preview_scale)):
        at_least(name, value)
    at_least("batch_size", batch_size)
    plan = _plan(check_at, survivors, n, keep)
    requests = plan_requests(prompt, negative_prompt=negative_prompt, images_per_prompt=n * rounds, seed=seed)
    if len({request.seed for request in requests}) < len(requests):
        raise InputError("some seeds are equal, and so would be their images; give different ones")
    adapters = find_adapters(adapter, adapter_weight)
    if out is not None:
        refuse_folder(Path(out))
    judge = _judge(reward, device)
    _refuse_misfits(plan, scorer, rounds, revise, misalignments, judge)
    pipeline = load_pipeline(model, device=device, dtype=dtype, unet=unet)
    if pipeline is not model:
        pipeline.vae.enable_slicing()
    options = sampling_options(pipeline, steps=steps, guidance_scale=guidance_scale, height=height, width=width)
    settings: dict[str, Any] = {**model_name(model, pipeline), **({} if unet is None else {"unet": os.fspath(unet)})}
    settings |= drawn_with(pipeline, adapters, options) | {"negative_prompt": negative_prompt}
    if isinstance(scorer, LatentScorer):
        scorer.refuse_other(settings["fingerprints"], judge, [share for share, _ in plan], options)
    _refuse_preview_scale(preview_scale, pipeline, options)
    with contextlib.ExitStack() as stack:
        stack.enter_context(borrowed(pipeline))
        stack.enter_context(adapters_applied(pipeline, adapters))
        runs = PartialRuns(pipeline, options, requests[0])
        checks = _checks(plan, runs.total)
        total = rounds * _image_steps(n, checks, runs.total)
        advance = stack.enter_context(
            progress_bar(f"best of {n * rounds}", total, unit="steps", enabled=progress, best="-")
        )
        search = _Search(
            runs=runs,
            prompt=prompt,
            reward=judge,
            checks=checks,
            keep=keep,
            batch_size=int(batch_size or _BATCH_SIZE),
            scorer=_of_latents(scorer, pipeline),
            preview_scale=preview_scale,
            settings=settings,
            advance=advance,
        )
        prompts = search.rounds(requests, n, revise, misalignments or partial(misaligned_words, judge))
    images = [image for _, image in search.best]
    if out is not None:
        images = [_saved(image, Path(out), rank) for rank, image in enumerate(images)]
    return BestOfN(
        prompt=prompt,
        images=images,
        scores=[score for score, _ in search.best],
        candidates=search.candidates,
        checks=tuple(step for step, _ in checks),
        steps=runs.total,
        calls=runs.evaluations,
        plain_calls=len(prompts) * n * runs.total * runs.rows,
        prompts=prompts,
        reward=judge.name,
    )


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Spearman's, in [-1, 1]; `None` of less than three pairs, or where one side is constant."""
    from scipy.stats import spearmanr

    sides = [set(side) for side in zip(*pairs, strict=True)]
    if len(pairs) < 3 or min(map(len, sides)) < 2:
        return None
    return float(spearmanr(*zip(*pairs, strict=True)).statistic)


@dataclass
class _Search:
    """The candidates of all rounds, and the best of them.

    Attributes:
        prompt: that scores are of.
        checks: number of steps and how many go on, for each.
        scorer: of latents; `None` scores decoded previews.
        settings: of the images.
        advance: of the progress bar.
        best: score and image, best first, at most `keep`.
        candidates: so far.
    """

    runs: PartialRuns
    prompt: str
    reward: Reward
    checks: Sequence[tuple[int, int]]
    keep: int
    batch_size: int
    scorer: Reward | None
    preview_scale: int
    settings: dict[str, Any]
    advance: Advance
    best: list[tuple[float, GeneratedImage]] = field(default_factory=list)
    candidates: list[Candidate] = field(default_factory=list)

    def rounds(
        self, requests: Sequence[ImageRequest], n: int, revise: Revise | None, misalignments: Misalignments
    ) -> list[str]:
        """Rounds of `n` requests until there are no more or `revise` ends them; returns the prompt of each."""
        prompts = [self.prompt]
        for start in range(0, len(requests), n):
            drawn, number = prompts[-1], len(prompts)
            found = self.round(number, [replace(request, prompt=drawn) for request in requests[start : start + n]])
            if revise is None or start + n == len(requests):
                break
            image = self.best[0][1]
            scores = sorted((one.score for one in found if one.score is not None), reverse=True)
            words = misalignments(image.image, self.prompt)
            revised = revise(RevisionRequest(self.prompt, drawn, number, image, scores, words))
            if revised is None:
                break
            if not isinstance(revised, str):
                raise InputError(f"revise returned {revised!r}; it must return a prompt, or None to end")
            prompts.append(revised)
        return prompts

    def round(self, number: int, requests: Sequence[ImageRequest]) -> list[Candidate]:
        """Draw, drop, finish; returns the candidates of this round."""
        alive = [Unfinished(request) for request in requests]
        early: dict[int, list[float]] = {request.seed: [] for request in requests}
        final: dict[int, float] = {}
        for step, survivors in self.checks:
            after: list[Unfinished] = []
            for batch in self._batches(alive):
                moved, estimates = self.runs.advance(batch, step)
                for one, score in zip(moved, self._early(moved, estimates), strict=True):
                    early[one.request.seed].append(score)
                after += moved
                self.advance(len(batch) * (step - batch[0].steps))
            after.sort(key=lambda one: (-early[one.request.seed][-1], one.request.seed))
            # In their first order, so that batches that lose no one stay what they were.
            alive = sorted(after[:survivors], key=lambda one: one.request.number)
        for batch in self._batches(alive):
            images = self.runs.finish(batch)
            scores = self._checked(self.reward(images, self.prompt), batch, f"after {self.runs.total} steps")
            for one, image, score in zip(batch, images, scores, strict=True):
                final[one.request.seed] = score
                made = GeneratedImage(image, one.request.prompt, one.request.seed, dict(self.settings))
                self.best.append((score, made))
            self.best = sorted(self.best, key=lambda entry: (-entry[0], entry[1].seed))[: self.keep]
            self.advance(len(batch) * (self.runs.total - batch[0].steps), best=f"{self.best[0][0]:.4g}")
        found = [
            Candidate(one.seed, number, one.prompt, tuple(early[one.seed]), final.get(one.seed)) for one in requests
        ]
        self.candidates += found
        return found

    def _batches(self, alive: Sequence[Unfinished]) -> list[Sequence[Unfinished]]:
        return [alive[start : start + self.batch_size] for start in range(0, len(alive), self.batch_size)]

    def _early(self, batch: Sequence[Unfinished], estimates: Float[Tensor, "n ..."]) -> list[float]:
        if self.scorer is None:
            scores = self.reward(self.runs.preview(estimates, self.preview_scale), self.prompt)
        else:
            options = self.runs.options
            latents = unpacked(self.runs.pipeline, estimates, height=options.height, width=options.width)
            scores = self.scorer(latents, self.prompt)
        return self._checked(scores, batch, f"after {batch[0].steps} of {self.runs.total} steps")

    def _checked(self, scores: Float[np.ndarray, " n"], batch: Sequence[Unfinished], when: str) -> list[float]:
        for one, score in zip(batch, scores, strict=True):
            if not math.isfinite(score):
                raise InputError(
                    f"the score of seed {one.request.seed} {when} is {score}; give another reward, or dtype float32"
                )
        return scores.tolist()


def _plan(
    check_at: float | Sequence[float] | None, survivors: int | Sequence[int] | None, n: int, keep: int
) -> list[tuple[float, int]]:
    """Share of the steps and how many go on, for each check."""
    if keep > n:
        raise InputError(f"keep is {keep} of n {n}; give a larger n, or keep less")
    if check_at is None:
        if survivors is not None:
            raise InputError(f"survivors is {survivors!r} but check_at is None; give check_at, such as 0.4")
        return []
    shares = [check_at] if isinstance(check_at, str | float | int) else list(check_at)
    if not shares:
        raise InputError("check_at is empty; give shares of the steps, or None to drop no image")
    for share in shares:
        check_step(share, 2)
    if shares != sorted(set(shares)):
        raise InputError(f"check_at {shares} does not ascend; give each share once, the earliest first")
    if survivors is None:
        last = max(keep, math.ceil(n / 4))
        counts = [max(last, round(n * (last / n) ** (place / len(shares)))) for place in range(1, len(shares) + 1)]
    else:
        counts = [*survivors] if isinstance(survivors, Sequence | np.ndarray) else [survivors]
    if len(counts) != len(shares):
        raise InputError(f"{len(counts)} survivors for {len(shares)} checks; give one for each")
    for before, count in zip([n, *counts], counts, strict=False):
        at_least("survivors", count, keep)
        if count > before:
            raise InputError(f"survivors is {count} of {before} that are left; give {before} or less")
    return [(float(share), int(count)) for share, count in zip(shares, counts, strict=True)]


def _refuse_misfits(
    plan: Sequence[tuple[float, int]],
    scorer: Scorer | None,
    rounds: int,
    revise: Revise | None,
    misalignments: Misalignments | None,
    judge: Reward,
) -> None:
    if scorer is not None and not plan:
        raise InputError("a scorer is given but check_at is None; give check_at, such as 0.4, or leave it out")
    if rounds > 1 and not judge.uses_text and revise is emphasise_misaligned and misalignments is None:
        raise InputError(
            f"rounds is {rounds} and the reward {judge.name} does not see the prompt, so no word can be emphasised; "
            "give a reward that does, or a larger n"
        )
    if rounds > 1 and revise is None:
        raise InputError(f"rounds is {rounds} without revise; give one, such as emphasise_misaligned, or a larger n")
    if revise is not None and rounds == 1:
        raise InputError("revise is given but rounds is 1; give rounds 2 or more")


def _checks(plan: Sequence[tuple[float, int]], total: int) -> list[tuple[int, int]]:
    """Number of steps and how many go on, for each check."""
    steps = [check_step(share, total) for share, _ in plan]
    if len(set(steps)) < len(steps):
        shares = ", ".join(f"{share:g}" for share, _ in plan)
        raise InputError(f"of {total} steps, check_at {shares} names one twice; give more steps, or fewer checks")
    return [(step, count) for step, (_, count) in zip(steps, plan, strict=True)]


def _image_steps(n: int, checks: Sequence[tuple[int, int]], total: int) -> int:
    """Steps of all images of a round."""
    ends = [0, *(step for step, _ in checks), total]
    alive = [n, *(count for _, count in checks)]
    return sum(count * (end - start) for count, start, end in zip(alive, ends, ends[1:], strict=False))


def _judge(reward: AnyReward | str | Sequence[str], device: str | torch.device | None) -> Reward:
    if isinstance(reward, str | Sequence):
        from .rewards import load_rewards

        return load_rewards(reward, device=device)
    return as_reward(reward)


def _of_latents(scorer: Scorer | None, pipeline: DiffusionPipeline) -> Reward | None:
    """As a reward, which sees that there is a number for each; the images are latents."""
    if scorer is None:
        return None
    score = scorer.on(pipeline) if isinstance(scorer, LatentScorer) else scorer
    if not callable(score):
        raise InputError(f"scorer {scorer!r} is no LatentScorer or callable of latents and prompts; give one")
    return as_reward(lambda latents, prompts: score(torch.stack(list(latents)), prompts))


def _refuse_preview_scale(scale: int, pipeline: DiffusionPipeline, options: SamplingOptions) -> None:
    unit = pipeline.vae_scale_factor * scale * (2 if pipeline_family(pipeline) == "flux" else 1)
    for name, size in (("height", options.height), ("width", options.width)):
        if size % unit:
            raise InputError(f"preview_scale {scale} needs a {name} that is a multiple of {unit}, not {size}; give 1")


def _saved(image: GeneratedImage, folder: Path, rank: int) -> GeneratedImage:
    path, there = saved_or_free(folder, rank, image.prompt, image.seed, image.settings)
    if not there:
        image.save(path)
    return replace(image, path=path)
