"""Directional decoupling: a reward that looks at the prompt past a learnt direction, against preference mode collapse.

After "Taming Preference Mode Collapse via Directional Decoupling Alignment in Diffusion Reinforcement Learning"
(D2-Align), arXiv 2512.24146. One vector b for all prompts is learnt while generator and reward stay as they are
(stage 1); a generator is then trained with the reward that b corrects (stage 2, by any trainer). Stage 1 sees the
frozen generator's images and their prompts as vectors only: embed them once, and b takes seconds on a CPU, where the
paper draws images anew in each of 3,000 steps.

What b is (ours): it starts along the part of the mean image vector that is orthogonal to the prompt, the modality gap
and the generator's average look. The corrected reward pulls towards that look, and so holds against a drift into the
reward's favourite corner. A long b makes the reward forget the prompt, and the loss does not mind: look at
`RewardDirection.norm` and at the gap between matched and mismatched prompts, with and without b.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import normalize

from mmalign.checks import at_least, in_range
from mmalign.errors import EncoderMismatchError, InputError, NonFiniteLossError, reason_of
from mmalign.files import load_tensors, save_tensors, whole_file
from mmalign.fingerprint import tensor_digest
from mmalign.plotting import name_axes, new_figure, save_figure
from mmalign.progress import progress_bar
from mmalign.representation_similarity import check_rows

from .embedding import EmbeddingReward
from .guided_texts import guided_reward, guided_text_embeds, matched_gap, prompt_numbers
from .reward import Reward

if TYPE_CHECKING:
    from collections.abc import Iterable

    from typing_extensions import Self

__all__ = [
    "DirectionFit",
    "DirectionalReward",
    "RewardDirection",
    "fit_reward_direction",
    "learn_reward_direction",
]

_FORMAT = "mmalign reward direction 1"
_LOOKS = 60  # times all pairs are looked at


@dataclass(frozen=True, eq=False)
class RewardDirection:
    """A learnt b, and what shows whether it is still a reward for the prompt.

    Attributes:
        b: the direction.
        omega: guidance scale that it was learnt with, and is used with.
        normalize_text: see `guided_text_embeds`.
        renormalize: see `guided_reward`.
        norm: |b|; prompts have length 1. The paper's settings keep it below lr * steps * sqrt(dim), about 0.5.
        gap: `matched_gap` with b, over the pairs that it was learnt from.
        gap_without: the same without b. Where `gap` is much less, b is too long: fewer steps, or `max_norm`.
        loss: -mean R with b, over those pairs.
        pairs: how many there were.
        curve: a line a look: `step`, `loss` of all pairs, `norm`, `gap`, and `grad_norm` of the last batch before it
            was clipped.
        settings: of the fit.
        reward: fingerprint of the reward whose vectors they were, where it was given.
        encoder: fingerprint of its encoder, likewise; vectors of another encoder are refused.
    """

    b: Float[Tensor, " dim"]
    omega: float
    normalize_text: bool
    renormalize: bool
    norm: float
    gap: float
    gap_without: float
    loss: float
    pairs: int
    curve: tuple[dict[str, float], ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    reward: str | None = None
    encoder: str | None = None

    def guide(self, text_embeds: Float[Tensor, "n dim"]) -> Float[Tensor, "n dim"]:
        """e~ of prompts, of length 1 with `renormalize`: what a reward sees in place of the prompt."""
        b = self.b.to(text_embeds)
        guided = guided_text_embeds(text_embeds, b, self.omega, normalize_text=self.normalize_text).e_tilde
        return normalize(guided, dim=-1) if self.renormalize else guided

    def to_dict(self) -> dict[str, Any]:
        """All but the vector, JSON-safe."""
        return {
            item.name: list(value) if isinstance(value := getattr(self, item.name), tuple) else value
            for item in fields(self)
            if item.name != "b"
        }

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one safetensors file, with `to_dict` in its metadata.

        Raises:
            InputError: it cannot be written.
        """
        about = {"format": _FORMAT, "direction": json.dumps(self.to_dict(), sort_keys=True)}
        with whole_file(path) as fresh:
            save_tensors({"b": self.b}, fresh, about)
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote.

        Raises:
            InputError: there is no such file, or it is damaged or another one.
        """
        name = os.fspath(path)
        tensors, about = load_tensors(path, _FORMAT, "learn it again")
        try:
            found = json.loads(about["direction"])
            direction = cls(tensors["b"], **{**found, "curve": tuple(found["curve"])})
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"direction {name!r} is damaged ({reason_of(error)}); learn it again") from None
        if direction.b.ndim != 1 or not direction.b.isfinite().all():
            raise InputError(f"direction {name!r} is damaged (b is no finite vector); learn it again")
        return direction

    def draw(self, path: str | os.PathLike[str]) -> Path:
        """A PNG of the way there: |b|, the gap with the gap without b as a line, and the loss.

        Raises:
            InputError: it cannot be written.
        """
        figure, axes = new_figure(3, 3.0)
        steps = [line["step"] for line in self.curve]
        titles = {"norm": "length of b", "gap": "gap of matched and mismatched prompts", "loss": "loss, -mean R"}
        for axis, (name, title) in zip(axes, titles.items(), strict=True):
            axis.plot(steps, [line[name] for line in self.curve])
            name_axes(axis, title, "step")
        axes[1].axhline(self.gap_without, color="0.6", linestyle="--", linewidth=0.8)
        axes[1].set_ylim(bottom=min(0.0, axes[1].get_ylim()[0]))
        with whole_file(path) as fresh:
            save_figure(figure, fresh)
        return Path(path)


def fit_reward_direction(
    image_embeds: Float[Tensor, "n dim"],
    text_embeds: Float[Tensor, "n dim"],
    *,
    omega: float = 1.5,
    steps: int = 3000,
    lr: float = 5e-6,
    weight_decay: float = 1e-4,
    max_grad_norm: float = 0.1,
    batch_size: int = 64,
    normalize_text: bool = True,
    renormalize: bool = True,
    max_norm: float | None = None,
    seed: int = 0,
    progress: bool = False,
    reward: EmbeddingReward | None = None,
) -> RewardDirection:
    """Learn b from images of the frozen generator and their prompts: stage 1 of D2-Align.

    AdamW with betas (0.9, 0.999), from b = 0, which is no stationary point. A coordinate moves at most about `lr` a
    step, so that lr * steps * sqrt(dim) bounds |b|. The defaults are the paper's, but for the batch, of which it says
    one image a GPU.

    Args:
        image_embeds: by the reward's image tower, of any length.
        text_embeds: of the prompts, row by row. Rows of equal values are of one prompt.
        omega: guidance scale, not 0.5, where R(b) = R(-b); 1.5 was best for HPS-v2.1 and PickScore.
        steps: the paper finds b's effect stable from about 2,000.
        lr: of AdamW, constant.
        weight_decay: decoupled.
        max_grad_norm: what gradients are clipped to.
        batch_size: pairs a step, all where there are fewer.
        normalize_text: see `guided_text_embeds`.
        renormalize: see `guided_reward`.
        max_norm: keep |b| at most this long (ours); `None` does not.
        seed: of the order of the pairs.
        progress: show a bar.
        reward: whose vectors they are; its fingerprint and its encoder's are kept.

    Raises:
        InputError: rows that are not finite or not as many, all of one prompt, or an option out of range.
        NonFiniteLossError: a step gave no number.
    """
    settings = {
        "steps": steps,
        "batch_size": batch_size,
        "lr": lr,
        "weight_decay": weight_decay,
        "max_grad_norm": max_grad_norm,
        "max_norm": max_norm,
        "seed": seed,
    }
    _check(image_embeds, text_embeds, omega, settings)
    # Copies, as what was encoded in inference mode takes part in no gradient.
    images, texts = image_embeds.detach().clone(), text_embeds.detach().to(image_embeds).clone()
    how: dict[str, Any] = {"omega": omega, "normalize_text": normalize_text, "renormalize": renormalize}
    fit = DirectionFit(
        images[0], lr=lr, weight_decay=weight_decay, max_grad_norm=max_grad_norm, max_norm=max_norm, **how
    )
    curve: list[dict[str, float]] = []

    @torch.no_grad()
    def look(step: int, grad_norm: float) -> None:
        loss = -float(guided_reward(images, texts, fit.b, **how).mean())
        line = {"step": step, "loss": loss, "norm": float(fit.b.norm())}
        curve.append({**line, "gap": matched_gap(images, texts, fit.b, **how), "grad_norm": grad_norm})

    every, batches = max(1, steps // _LOOKS), _batches(len(images), batch_size, seed)
    look(0, 0.0)
    with progress_bar("learning the direction", steps, unit="steps", enabled=progress, norm="-", gap="-") as advance:
        for step in range(1, steps + 1):
            rows = next(batches).to(images.device)
            _, grad_norm = fit.step(images[rows], texts[rows])
            if step % every == 0 or step == steps:
                look(step, grad_norm)
            advance(1, norm=f"{curve[-1]['norm']:.3f}", gap=f"{curve[-1]['gap']:.4f}")
    return RewardDirection(
        fit.b.detach().clone(),
        **how,
        norm=curve[-1]["norm"],
        gap=curve[-1]["gap"],
        gap_without=curve[0]["gap"],
        loss=curve[-1]["loss"],
        pairs=len(images),
        curve=tuple(curve),
        settings=settings,
        reward=reward.fingerprint if reward else None,
        encoder=reward.encoder.fingerprint if reward else None,
    )


def learn_reward_direction(
    reward: EmbeddingReward, images: Iterable[Any], prompts: str | Sequence[str], **options: Any
) -> RewardDirection:
    """`fit_reward_direction` of images that the frozen generator has drawn, and their prompts.

    Args:
        reward: of texts and images as two vectors.
        images: as `Reward` takes them.
        prompts: one for each.
        options: of `fit_reward_direction`.

    Raises:
        InputError: as `DirectionalReward`, `Reward` and `fit_reward_direction`.
        UnreadableImageError: an image cannot be read.
    """
    vectors = _Vectors(_two_towers(reward))
    vectors(images, prompts)
    if not vectors.images:
        raise InputError("there are no images to learn from; give some of several prompts")
    return fit_reward_direction(torch.cat(vectors.images), torch.cat(vectors.texts), reward=reward, **options)


class DirectionalReward(EmbeddingReward):
    """A reward of images and prompts as vectors, that sees e~ in place of the prompt's vector.

    Its scale is the reward's own: with the cosine it is R(.; b) of the paper, with a reward that is a multiple of the
    cosine that multiple of R. Gradients reach the pixels.

    Attributes:
        reward: what scores.
        direction: what it is corrected by.
    """

    def __init__(self, reward: EmbeddingReward, direction: RewardDirection) -> None:
        """Put a learnt direction on the reward it was learnt from, or on another one of the same encoder.

        Raises:
            InputError: the reward does not see texts and images as two vectors, or `direction` is of another width.
            EncoderMismatchError: the direction was learnt from vectors of another encoder.
        """
        _two_towers(reward)
        if direction.encoder not in (None, reward.encoder.fingerprint):
            raise EncoderMismatchError(
                f"the direction was learnt from vectors of the encoder {str(direction.encoder)[:12]}, and "
                f"{reward.name} is of {reward.encoder.fingerprint[:12]}; learn one for it by learn_reward_direction"
            )
        if len(direction.b) != reward.encoder.dim:
            raise InputError(
                f"the direction has {len(direction.b)} dimensions and the vectors of {reward.name} have "
                f"{reward.encoder.dim}; learn one for it by learn_reward_direction"
            )
        super().__init__(reward.encoder, preprocessing=reward.preprocessing)
        self.reward, self.direction = reward, direction
        self.name = f"directed {reward.name}"
        self.differentiable = reward.differentiable
        self.range = reward.range if direction.renormalize else (None, None)
        if reward.fingerprint is not None:
            how = (direction.omega, direction.normalize_text, direction.renormalize)
            self.fingerprint = f"{reward.fingerprint} with direction {tensor_digest(direction.b)} {how}"

    def score_embeds(
        self, image_embeds: Float[Tensor, "n dim"], text_embeds: Float[Tensor, "n dim"] | None
    ) -> Float[Tensor, " n"]:
        """The reward's score of the images and e~."""
        assert text_embeds is not None
        return self.reward.score_embeds(image_embeds, self.direction.guide(text_embeds))

    def image_embeds(self, images: Sequence[Float[Tensor, "3 height width"]]) -> Float[Tensor, "n dim"]:
        """The reward's own."""
        return self.reward.image_embeds(images)

    def text_embeds(self, prompts: Sequence[str]) -> Float[Tensor, "n dim"]:
        """The reward's own, before the direction."""
        return self.reward.text_embeds(prompts)


class DirectionFit:
    """b and its optimiser; the batches are the caller's.

    Attributes:
        b: the direction as it is, from zero.
    """

    def __init__(
        self,
        like: Float[Tensor, " dim"],
        *,
        omega: float,
        lr: float,
        weight_decay: float,
        max_grad_norm: float,
        max_norm: float | None = None,
        normalize_text: bool = True,
        renormalize: bool = True,
    ) -> None:
        """Start in the width, dtype and place of `like`; for the rest see `fit_reward_direction`."""
        self.b = nn.Parameter(torch.zeros_like(like))
        self._how: dict[str, Any] = {"omega": omega, "normalize_text": normalize_text, "renormalize": renormalize}
        self._max_grad_norm, self._max_norm = max_grad_norm, max_norm
        self._optimizer = torch.optim.AdamW([self.b], lr=lr, betas=(0.9, 0.999), weight_decay=weight_decay)

    @torch.enable_grad()
    def step(
        self, image_embeds: Float[Tensor, "batch dim"], text_embeds: Float[Tensor, "batch dim"]
    ) -> tuple[float, float]:
        """One update; the loss before it, and the length of its gradient before that was clipped.

        Raises:
            NonFiniteLossError: either is no number; b has not been changed.
        """
        loss = -guided_reward(image_embeds, text_embeds, self.b, **self._how).mean()
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.b, self._max_grad_norm)
        if not (loss.isfinite() and norm.isfinite()):
            raise NonFiniteLossError(
                f"the loss of a direction of length {float(self.b.detach().norm()):g} is {float(loss.detach()):g}, or "
                "its gradient is no number; lower lr"
            )
        self._optimizer.step()
        with torch.no_grad():
            if self._max_norm is not None and (length := float(self.b.norm())) > self._max_norm:
                self.b.mul_(self._max_norm / length)
        return float(loss.detach()), float(norm)


class _Vectors(Reward):
    """Keeps the vectors of what it is asked to score."""

    def __init__(self, reward: EmbeddingReward) -> None:
        self._reward = reward
        self.images: list[Tensor] = []
        self.texts: list[Tensor] = []

    def score(self, images: Sequence[Tensor], prompts: Sequence[str]) -> list[float]:
        self.images.append(self._reward.image_embeds(images))
        self.texts.append(self._reward.text_embeds(prompts))
        return [0.0] * len(images)


def _two_towers(reward: Any) -> EmbeddingReward:
    if isinstance(reward, EmbeddingReward) and reward.uses_text:
        return reward
    name = getattr(reward, "name", None) or getattr(reward, "__name__", type(reward).__name__)
    why = "does not see the prompt" if isinstance(reward, EmbeddingReward) else "gives no vectors of image and prompt"
    raise InputError(
        f"the reward {name} {why}, so that there is nothing to direct; rewards that compare the two as vectors work: "
        "CLIPScore, PickScore, HPS v2, or CosineReward of any encoder of both"
    )


def _check(images: Tensor, texts: Tensor, omega: float, settings: dict[str, Any]) -> None:
    for name, rows in (("image_embeds", images), ("text_embeds", texts)):
        check_rows(name, rows)
        if not (rows != 0).any(dim=1).all():
            raise InputError(f"{name} row {int((rows != 0).any(dim=1).int().argmin())} is zero; leave that pair out")
    if images.shape != texts.shape:
        shapes = f"{tuple(images.shape)} and {tuple(texts.shape)}"
        raise InputError(f"image_embeds and text_embeds have shapes {shapes}; give a row of each for every image")
    if int(prompt_numbers(texts).max()) == 0:
        raise InputError("all text_embeds are of one prompt; b is one for all prompts: give images of several")
    for name in ("steps", "batch_size"):
        at_least(name, settings[name])
    at_least("seed", settings["seed"], 0)
    for name in ("lr", "max_grad_norm", "max_norm"):
        in_range(name, settings[name], 1e-12)
    in_range("weight_decay", settings["weight_decay"], 0)
    in_range("omega", omega)
    if omega == 0.5:
        raise InputError("omega is 0.5, at which b = 0 has no gradient; the paper's is 1.5")


def _batches(count: int, size: int, seed: int) -> Iterator[Int[Tensor, " batch"]]:
    """Row numbers in ever new orders, each in full before the next; of the last ones too few for a batch are left."""
    generator = torch.Generator().manual_seed(seed)
    size = min(size, count)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from (order[start : start + size] for start in range(0, count - size + 1, size))
