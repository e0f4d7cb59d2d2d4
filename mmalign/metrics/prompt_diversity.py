"""How alike the images of a prompt, and those of different prompts, are; with intervals over prompts."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float, Int

from mmalign.errors import InputError

from ._arrays import as_numpy, as_rows, unit_rows
from .diversity import TonalStatistics, tonal_statistics, tonal_variation

__all__ = [
    "HIGHER_IS_MORE_DIVERSE",
    "Figure",
    "diversity_values",
    "interval",
    "number_groups",
    "of_prompts",
    "similarity_figures",
    "tonal_figures",
]

HIGHER_IS_MORE_DIVERSE: dict[str, bool] = {
    "within_prompt_similarity": False,
    "between_prompt_similarity": False,
    "identity_similarity": False,
    "spatial_diversity": True,
    "coverage": True,
    "tonal_variation": True,
    "saturation_variation": True,
    "value_variation": True,
    "contrast_variation": True,
}

# Of how often each prompt is drawn, a row a draw.
Resampled: TypeAlias = "Callable[[Float[np.ndarray, 'draw prompt']], Float[np.ndarray, ' draw']]"


@dataclass(frozen=True)
class Figure:
    """A value, the same value of resampled prompts, and what it is of each prompt (NaN where it is not defined)."""

    value: float
    resampled: Resampled
    per_prompt: Float[np.ndarray, " prompt"] | None = None


def diversity_values(
    pixels: Iterable[Any] | None,
    embeds: Float[np.ndarray, "n dim"] | None = None,
    groups: Sequence[Hashable] | None = None,
) -> dict[str, float]:
    """The figures of `generation.diversity` that need no model, to be logged while a generator is trained.

    within_prompt_similarity: mean over prompts of the mean pairwise cosine of their images, IDS on any embeddings;
    between_prompt_similarity: mean over pairs of prompts of the mean cosine of their images; tonal_variation: PVS over
    all images, and its terms saturation_variation, value_variation, contrast_variation. What cannot be had is left out:
    the first needs a prompt with two images, the second two prompts, the others two images.

    A similarity that rises over training, and a variation that falls, is collapse (`HIGHER_IS_MORE_DIVERSE`). Compare
    values of the same prompts with the same number of images only.

    Args:
        pixels: tensors `3 height width` (or one `n 3 height width`) or arrays `height width 3`; uint8, or float in
            [0, 1]. None leaves PVS out.
        embeds: one row an image, of any image encoder; normalised inside. None leaves similarities out.
        groups: the prompt of each image, or its number; None is one prompt for all.

    Raises:
        InputError: neither pixels nor embeds, or not as many of them as of groups, pixels outside [0, 1], or a row that
            is zero or not finite.
    """
    if pixels is None and embeds is None:
        raise InputError("there are neither pixels nor embeds; give one or both")
    tones = None if pixels is None else tonal_statistics(pixels)
    images = len(tones.value) if tones is not None else 0 if embeds is None else len(embeds)
    numbers, _ = number_groups(groups, images)
    if tones is not None and embeds is not None and len(embeds) != images:
        raise InputError(f"embeds have {len(embeds)} rows for {images} images; give one each")
    found = {} if embeds is None else similarity_figures(embeds, numbers)
    found |= {} if tones is None else tonal_figures(tones, numbers)
    return {name: figure.value for name, figure in found.items()}


def number_groups(groups: Sequence[Hashable] | None, images: int) -> tuple[Int[np.ndarray, " n"], list[Hashable]]:
    """A number from 0 for each image, and the groups in the order in which they come first.

    Raises:
        InputError: not one group an image.
    """
    if groups is None:
        groups = [""] * images
    listed = as_numpy(groups).tolist() if hasattr(groups, "dtype") else list(groups)
    if len(listed) != images:
        raise InputError(f"groups are {len(listed)} for {images} images; give one each")
    known: dict[Hashable, int] = {}
    numbers = [known.setdefault(group, len(known)) for group in listed]
    return np.array(numbers, np.int64), list(known)


def similarity_figures(embeds: Float[np.ndarray, "n dim"], numbers: Int[np.ndarray, " n"]) -> dict[str, Figure]:
    """Mean cosine within and between prompts, each prompt and each pair of prompts with the same weight.

    Raises:
        InputError: a row that is zero or not finite.
    """
    rows = as_rows(embeds, "embeds").astype(np.float64)
    bad = ~np.isfinite(rows).all(axis=1)
    if bad.any():
        raise InputError(f"embeds row {int(bad.argmax())} is not finite; leave that image out")
    rows = unit_rows(rows, "embeds")
    sizes = np.bincount(numbers)
    sums = np.zeros((len(sizes), rows.shape[1]))
    np.add.at(sums, numbers, rows)
    found = {}
    several = sizes > 1
    if several.any():
        pairs = np.maximum(sizes * (sizes - 1), 1)
        per_prompt = np.where(several, ((sums**2).sum(axis=1) - sizes) / pairs, np.nan)
        found["within_prompt_similarity"] = of_prompts(per_prompt)
    if len(sizes) > 1:
        means = sums / sizes[:, None]
        squares = (means**2).sum(axis=1)

        def between(weights: Float[np.ndarray, "draw prompt"]) -> Float[np.ndarray, " draw"]:
            """Over pairs of different prompts: a prompt drawn twice makes no pair with itself."""
            total = ((weights @ means) ** 2).sum(axis=1) - weights**2 @ squares
            return _ratio(total, weights.sum(axis=1) ** 2 - (weights**2).sum(axis=1))

        found["between_prompt_similarity"] = Figure(float(between(np.ones((1, len(sizes))))[0]), between)
    return found


def tonal_figures(tones: TonalStatistics, numbers: Int[np.ndarray, " n"]) -> dict[str, Figure]:
    """PVS over all images and its three terms; nothing for fewer than two images."""
    if len(numbers) < 2:
        return {}
    values = tonal_variation(tones)
    prompts = int(numbers.max()) + 1
    sizes = np.bincount(numbers)
    moments = []
    for column in tones:
        centred = column - column.mean()
        moments.append([np.bincount(numbers, centred**power, prompts) for power in (1, 2)])

    def term(number: int) -> Resampled:
        first, second = moments[number]

        def deviation(weights: Float[np.ndarray, "draw prompt"]) -> Float[np.ndarray, " draw"]:
            images = weights @ sizes
            return np.sqrt(np.maximum(weights @ second / images - (weights @ first / images) ** 2, 0))

        return deviation

    terms = [term(number) for number in range(3)]
    names = ("saturation_variation", "value_variation", "contrast_variation")
    parts = {name: Figure(value, of) for name, value, of in zip(names, values[1:], terms, strict=True)}
    total = Figure(values.pvs, lambda weights: np.sum([of(weights) for of in terms], axis=0))
    return {"tonal_variation": total, **parts}


def of_prompts(per_prompt: Float[np.ndarray, " prompt"]) -> Figure:
    """The mean over the prompts for which a value is defined, of which there is one at least."""
    defined = ~np.isnan(per_prompt)
    filled = np.where(defined, per_prompt, 0)
    return Figure(
        float(per_prompt[defined].mean()),
        lambda weights: _ratio(weights @ filled, weights @ defined),
        per_prompt,
    )


def interval(figure: Figure, prompts: int, *, resamples: int, seed: int) -> tuple[float, float] | None:
    """The 95 % percentile interval over resampled prompts; `None` for fewer than three with a value, or 0 resamples."""
    defined = prompts if figure.per_prompt is None else int((~np.isnan(figure.per_prompt)).sum())
    if defined < 3 or not resamples:
        return None
    draws = np.random.default_rng(seed).multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples)
    low, high = np.nanquantile(figure.resampled(draws.astype(np.float64)), [0.025, 0.975])
    return float(low), float(high)


def _ratio(above: Float[np.ndarray, " draw"], below: Float[np.ndarray, " draw"]) -> Float[np.ndarray, " draw"]:
    return np.divide(above, below, out=np.full(len(above), np.nan), where=below > 0)
