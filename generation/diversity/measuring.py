"""How diverse a set of images is, measured with any encoder, with boxes and faces where they are given."""

from __future__ import annotations

import math
import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image

from mmalign.checks import at_least
from mmalign.encoders.stream import encode_stream
from mmalign.errors import EncoderMismatchError, InputError, UnreadableImageError
from mmalign.features.items import report as skipped_entry
from mmalign.imaging import DecodedImage, read_image
from mmalign.metrics import (
    CoverageResult,
    TonalStatistics,
    artistic_coverage,
    identity_similarity,
    spatial_diversity,
    tonal_statistics,
)
from mmalign.metrics.prompt_diversity import (
    HIGHER_IS_MORE_DIVERSE,
    Figure,
    interval,
    number_groups,
    of_prompts,
    similarity_figures,
    tonal_figures,
)
from mmalign.prefetch import prefetch
from mmalign.progress import progress_bar

if TYPE_CHECKING:
    from mmalign.encoders import Encoder

__all__ = ["DiversityReport", "PromptDifference", "compare_prompts", "embed_images", "measure_diversity"]

FEW_PROMPTS = 20
_Tones: TypeAlias = "tuple[float, float, float]"  # one image's `TonalStatistics`


@dataclass(frozen=True)
class DiversityReport:
    """What was measured of a set of images; names as in `HIGHER_IS_MORE_DIVERSE`, which says what a value means.

    Attributes:
        values: name -> value; what could not be measured is not there.
        intervals: name -> 95 % interval over prompts, where there is one.
        per_prompt: within_prompt_similarity and spatial_diversity of each prompt that has two images.
        prompts: prompt -> number of its images.
        empty_share: of the images with boxes, the share without any.
        coverage: the counts behind ASC.
        encoder: spec and fingerprint; `None` without one.
        notes: what a person should know of the numbers.
        skipped: images that could not be read: row, name, reason and message.
    """

    values: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    per_prompt: dict[str, dict[str, float]]
    prompts: dict[str, int]
    empty_share: float | None = None
    coverage: CoverageResult | None = None
    encoder: dict[str, str] | None = None
    notes: list[str] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)

    @property
    def images(self) -> int:
        """How many were measured."""
        return sum(self.prompts.values())

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        figures = {}
        for name, value in self.values.items():
            low, high = self.intervals.get(name, (None, None))
            figures[name] = {
                "value": value,
                "low": low,
                "high": high,
                "higher_is_more_diverse": HIGHER_IS_MORE_DIVERSE[name],
            }
        reached = None
        if self.coverage is not None:
            reached = {
                "asc": self.coverage.asc,
                "generated": self.coverage.generated._asdict(),
                "test": self.coverage.test._asdict(),
            }
        return {
            "figures": figures,
            "images": self.images,
            "prompts": self.prompts,
            "per_prompt": self.per_prompt,
            "empty_share": self.empty_share,
            "coverage": reached,
            "encoder": self.encoder,
            "notes": self.notes,
            "skipped": self.skipped,
        }


def measure_diversity(
    images: Iterable[Any],
    groups: Sequence[Hashable] | None = None,
    *,
    encoder: Encoder | str | None = None,
    reference: Iterable[Any] | Float[np.ndarray, "m dim"] | None = None,
    reference_test: Iterable[Any] | Float[np.ndarray, "k dim"] | None = None,
    queries: int | None = None,
    boxes: Sequence[Any] | None = None,
    faces: Float[np.ndarray, "face dim_face"] | None = None,
    resamples: int = 1000,
    seed: int = 0,
    batch_size: int | None = None,
    workers: int | None = None,
    progress: bool = False,
) -> DiversityReport:
    """Measure a set of images: similarity within and between prompts, PVS, and what else there is data for.

    Images that cannot be read are left out and reported. Intervals resample prompts; coverage and identity similarity,
    which are no means over prompts, have none.

    Args:
        images: paths, Pillow images, generated images, float tensors `3 height width` in [0, 1] and whatever else
            `mmalign.imaging.read_image` takes. All are measured at 8 bits, as they would be saved.
        groups: the prompt of each image. `None`: generated images have theirs, all others are of one prompt.
        encoder: of images, or what `load_encoder` takes. `None` leaves out what needs embeddings.
        reference: real images, or their embeddings by the same encoder, for coverage (ASC).
        reference_test: other real ones to compare with. `None` holds out a half of `reference`, by chance.
        queries: at most so many generated images, and as many test images, enter coverage; give the same number for
            sets that are to be compared.
        boxes: for each image its boxes x0, y0, x1, y1 (an empty list where nothing was found, `None` where nobody
            looked), for SDI.
        faces: face embeddings of the set (ArcFace in the paper), in any order, for IDS.
        resamples: draws behind the 95 % intervals; 0 for none.
        seed: of the intervals and of what is drawn for coverage.
        batch_size, workers, progress: see `Encoder.encode_images`.

    Raises:
        InputError: no image that can be read, another number of groups or boxes than of images, a reference without
            an encoder or with too few images, or data that the metrics refuse.
    """
    if isinstance(images, (str, bytes, os.PathLike, Image.Image)) or getattr(images, "ndim", 4) == 3:
        raise InputError("images are one image; give a list of two or more")
    items = list(images)
    at_least("resamples", resamples, 0)
    at_least("queries", queries, 2)
    if isinstance(encoder, str):
        from mmalign.encoders import load_encoder

        encoder = load_encoder(encoder)
    if reference is not None and encoder is None:
        raise InputError("reference images are given without an encoder; give one, or leave them out")
    if reference_test is not None and reference is None:
        raise InputError("reference_test is given without reference; give both, or reference alone")
    if boxes is not None and len(boxes) != len(items):
        raise InputError(f"boxes are {len(boxes)} for {len(items)} images; give a list for each")
    if groups is None:
        groups = [getattr(item, "prompt", "") for item in items]
    every, named = number_groups(groups, len(items))
    seen = _look(items, encoder, batch_size, workers, progress)
    kept = [row for row, tones in enumerate(seen.tones) if tones is not None]
    if not kept:
        first = f" (first: {seen.skipped[0]['message']})" if seen.skipped else ""
        raise InputError(f"none of {len(items)} images can be read{first}; check the paths")
    present, numbers = np.unique(every[kept], return_inverse=True)
    labels = [str(named[number]) for number in present.tolist()]

    notes: list[str] = []
    figures: dict[str, Figure] = {}
    if seen.embeds is not None:
        figures |= similarity_figures(seen.embeds, numbers)
    empty_share = None
    if boxes is not None:
        figure, empty_share = _spatial([boxes[row] for row in kept], numbers, len(labels), notes)
        figures |= {} if figure is None else {"spatial_diversity": figure}
    figures |= tonal_figures(TonalStatistics(*np.array([seen.tones[row] for row in kept]).T), numbers)
    values = {name: figure.value for name, figure in figures.items()}
    if faces is not None:
        values["identity_similarity"] = identity_similarity(faces)
    coverage = None
    if reference is not None and encoder is not None and seen.embeds is not None:
        options = {"batch_size": batch_size, "workers": workers, "progress": progress}
        train, test = _references(encoder, reference, reference_test, seed, notes, options)
        coverage = _coverage(train, test, seen.embeds, queries, seed, notes)
        values["coverage"] = coverage.asc

    intervals = {
        name: found
        for name, figure in figures.items()
        if (found := interval(figure, len(labels), resamples=resamples, seed=seed)) is not None
    }
    sizes = np.bincount(numbers)
    notes += _about_prompts(sizes, bool(intervals))
    per_prompt = {
        name: {label: float(v) for label, v in zip(labels, figure.per_prompt, strict=True) if not math.isnan(v)}
        for name, figure in figures.items()
        if figure.per_prompt is not None
    }
    return DiversityReport(
        values={name: values[name] for name in HIGHER_IS_MORE_DIVERSE if name in values},
        intervals={name: intervals[name] for name in HIGHER_IS_MORE_DIVERSE if name in intervals},
        per_prompt=per_prompt,
        prompts=dict(zip(labels, sizes.tolist(), strict=True)),
        empty_share=empty_share,
        coverage=coverage,
        encoder=None if encoder is None else {"spec": encoder.spec, "fingerprint": encoder.fingerprint},
        notes=notes,
        skipped=seen.skipped,
    )


@dataclass(frozen=True)
class PromptDifference:
    """A figure of one set minus that of another, mean over the prompts of both, with its 95 % interval over them."""

    value: float
    interval: tuple[float, float] | None
    prompts: int


def compare_prompts(
    report: DiversityReport,
    baseline: DiversityReport,
    name: str = "within_prompt_similarity",
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> PromptDifference | None:
    """The paired difference of a figure that each prompt has; `None` where no prompt is in both reports.

    That some prompts leave less room than others widens the intervals of both sets, but not this one.

    Raises:
        EncoderMismatchError: similarities by two encoders.
    """
    encoders = [one.encoder["fingerprint"] for one in (report, baseline) if one.encoder is not None]
    if name == "within_prompt_similarity" and len(set(encoders)) > 1:
        raise EncoderMismatchError("the reports are by two encoders; measure both sets with one")
    ours, theirs = report.per_prompt.get(name, {}), baseline.per_prompt.get(name, {})
    shared = [prompt for prompt in ours if prompt in theirs]
    if not shared:
        return None
    figure = of_prompts(np.array([ours[prompt] - theirs[prompt] for prompt in shared]))
    return PromptDifference(figure.value, interval(figure, len(shared), resamples=resamples, seed=seed), len(shared))


def embed_images(
    encoder: Encoder,
    images: Iterable[Any],
    *,
    batch_size: int | None = None,
    workers: int | None = None,
    progress: bool = False,
) -> tuple[Float[np.ndarray, "m dim"], list[dict[str, Any]]]:
    """Unit rows of the images that can be read, and the others as `DiversityReport.skipped` has them."""
    seen = _look(list(images), encoder, batch_size, workers, progress, tones=False)
    assert seen.embeds is not None
    return seen.embeds, seen.skipped


@dataclass(frozen=True)
class _Seen:
    """Tones of every image, `None` where it could not be read; embeddings of the others."""

    tones: list[_Tones | None]
    embeds: Float[np.ndarray, "read dim"] | None
    skipped: list[dict[str, Any]]


def _look(
    items: Sequence[Any],
    encoder: Encoder | None,
    batch_size: int | None,
    workers: int | None,
    progress: bool,
    *,
    tones: bool = True,
) -> _Seen:
    """One pass over the images: each is decoded once."""
    at_least("batch_size", batch_size)
    at_least("workers", workers)
    found: list[_Tones | None] = []
    failures: list[tuple[int, UnreadableImageError]] = []
    vectors: list[np.ndarray] = []

    def load(item: Any) -> tuple[_Tones, torch.Tensor | None]:
        source = getattr(item, "image", item)
        if encoder is None:
            return _tones(read_image(source)), None
        decoded, pixels = encoder.load_image(source)
        return _tones(decoded) if tones else (0.0, 0.0, 0.0), pixels

    with progress_bar("measuring images", len(items), enabled=progress) as advance:
        if encoder is None:
            for _, loaded in prefetch(items, load, ahead=64, workers=workers):
                if isinstance(loaded, UnreadableImageError):
                    failures.append((len(found), loaded))
                    found.append(None)
                else:
                    found.append(loaded[0])
                advance()
        else:
            encoder.require("image")
            for batch in encode_stream(encoder, items, load, batch_size=batch_size, workers=workers):
                for outcome in batch.outcomes:
                    if outcome.error is not None:
                        failures.append((len(found), outcome.error))
                    found.append(outcome.payload)
                vectors.append(batch.vectors)
                advance(len(batch.outcomes))
    embeds = None
    if encoder is not None:
        embeds = np.concatenate(vectors) if vectors else np.zeros((0, encoder.dim), np.float32)
    return _Seen(found, embeds, [skipped_entry(items[row], row, error) for row, error in failures])


def _tones(image: DecodedImage) -> _Tones:
    saturation, value, contrast = (float(column[0]) for column in tonal_statistics([image.pixels]))
    return saturation, value, contrast


def _spatial(
    boxes: Sequence[Any], numbers: np.ndarray, prompts: int, notes: list[str]
) -> tuple[Figure | None, float | None]:
    """SDI of the prompts of which two images or more have been looked at, and the share of images without boxes."""
    looked: list[list[Any]] = [[] for _ in range(prompts)]
    for found, number in zip(boxes, numbers.tolist(), strict=True):
        if found is not None:
            looked[number].append(found)
    if missing := sum(found is None for found in boxes):
        notes.append(f"{missing:,} of {len(boxes):,} images have no detections, and are left out of spatial diversity")
    usable = [number for number, layouts in enumerate(looked) if len(layouts) > 1]
    if not usable:
        notes.append("no prompt has detections of two images; spatial diversity is left out")
        return None, None
    result = spatial_diversity([looked[number] for number in usable])
    per_prompt = np.full(prompts, np.nan)
    per_prompt[usable] = result.per_prompt
    if result.empty_share > 0.1:
        notes.append(
            f"{result.empty_share:.0%} of the images have no box: spatial diversity says little where prompts are not "
            "followed"
        )
    return of_prompts(per_prompt), result.empty_share


def _references(
    encoder: Encoder,
    reference: Any,
    reference_test: Any,
    seed: int,
    notes: list[str],
    options: Mapping[str, Any],
) -> tuple[np.ndarray, np.ndarray]:
    train = _embeds(encoder, "reference", reference, notes, options)
    if reference_test is not None:
        return train, _embeds(encoder, "reference_test", reference_test, notes, options)
    if len(train) < 4:
        raise InputError(f"reference has {len(train)} images; give 4 or more, half of which are held out")
    order = np.random.default_rng(seed).permutation(len(train))
    half = len(train) // 2
    return train[order[half:]], train[order[:half]]


def _embeds(encoder: Encoder, name: str, given: Any, notes: list[str], options: Mapping[str, Any]) -> np.ndarray:
    if getattr(given, "ndim", None) == 2:
        if given.shape[1] != encoder.dim:
            raise InputError(
                f"{name} has {given.shape[1]} dimensions, {encoder.spec!r} {encoder.dim}; embed them by it"
            )
        return given
    rows, skipped = embed_images(encoder, given, **options)
    if skipped:
        notes.append(f"{len(skipped):,} images of {name} cannot be read (first: {skipped[0]['name']!r})")
    return rows


def _coverage(
    train: np.ndarray, test: np.ndarray, embeds: np.ndarray, queries: int | None, seed: int, notes: list[str]
) -> CoverageResult:
    """ASC of equally many images of both, drawn by chance where one side has more."""
    count = min(len(test), len(embeds), len(test) if queries is None else queries)
    rng = np.random.default_rng(seed)
    drawn = [rows[np.sort(rng.permutation(len(rows))[:count])] for rows in (test, embeds)]
    result = artistic_coverage(train, *drawn)
    notes.append(
        f"coverage: {count:,} generated images reach {result.generated.learned:,} of {len(train):,} reference images, "
        f"as many real ones {result.test.learned:,}"
    )
    if result.test.reachable == len(train):
        notes.append(
            "coverage: the real images are too few to tell how much of the reference they would reach; give as many "
            "images as reference ones, or more"
        )
    return result


def _about_prompts(sizes: np.ndarray, resampled: bool) -> list[str]:
    notes = []
    if single := int((sizes == 1).sum()):
        notes.append(f"{single:,} of {len(sizes):,} prompts have one image, and no similarity within")
    if len(sizes) == 1:
        notes.append("all images are of one prompt: there are no intervals, and no similarity between prompts")
    elif len(sizes) == 2:
        notes.append("2 prompts are too few for intervals")
    elif resampled and len(sizes) < FEW_PROMPTS:
        notes.append(f"{len(sizes)} prompts are few: the 95 % intervals over them are rough, and rather too narrow")
    return notes
