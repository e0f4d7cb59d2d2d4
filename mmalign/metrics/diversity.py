"""The four diversity metrics of DivGenBench, arXiv 2512.24146 (supplement, Eq. 11-19), on embeddings, boxes and pixels.

What they catch is a generator that was trained against a reward until it draws one look: one face (IDS), one layout
(SDI), one tonality (PVS), few styles (ASC). Methods card "D2-Align", section 9. Any embeddings and boxes do; figures of
the paper need its own: ArcFace for IDS, CSD for ASC, Grounding DINO for SDI.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from mmalign.checks import at_least
from mmalign.errors import InputError

from ._arrays import as_numpy, as_rows, unit_rows
from .ranking import score_blocks

__all__ = [
    "CoverageResult",
    "RetrievalScore",
    "SpatialDiversity",
    "TonalStatistics",
    "TonalVariation",
    "artistic_coverage",
    "identity_similarity",
    "image_retrieval_score",
    "layout_similarity",
    "reachable_count",
    "spatial_diversity",
    "tonal_statistics",
    "tonal_variation",
]

GREY = (0.299, 0.587, 0.114)  # of R, G, B


class SpatialDiversity(NamedTuple):
    """SDI in [0, 1], higher is more diverse; its mean is over `per_prompt`.

    `empty_share` is the share of images without a box: where it is high, prompts are not followed, and the index says
    little.
    """

    sdi: float
    per_prompt: Float[np.ndarray, " prompt"]
    empty_share: float


class TonalStatistics(NamedTuple):
    """One number an image: mean HSV saturation, mean HSV value, standard deviation of the grey image; in [0, 1]."""

    saturation: Float[np.ndarray, " image"]
    value: Float[np.ndarray, " image"]
    contrast: Float[np.ndarray, " image"]


class TonalVariation(NamedTuple):
    """PVS, higher is more diverse, and its three terms: standard deviations over images."""

    pvs: float
    saturation: float
    value: float
    contrast: float


class RetrievalScore(NamedTuple):
    """How much of a reference set queries reach: `learned` of its items are a nearest neighbour, `reachable` (s*) is
    the most likely number that would be with endless queries; `alpha` and `inf` are their shares of the set.
    """

    learned: int
    reachable: int
    alpha: float
    inf: float


class CoverageResult(NamedTuple):
    """ASC, higher is more diverse: `generated.inf / test.inf`; 1 where generated images reach as much as real ones."""

    asc: float
    generated: RetrievalScore
    test: RetrievalScore


def identity_similarity(embeddings: Float[np.ndarray, "item dim"]) -> float:
    """IDS = 2 / (N (N - 1)) sum_{i<j} cos(v_i, v_j), in [-1 / (N - 1), 1]. Lower is more diverse.

    In time and memory that grow with N, as sum_{i,j} cos(v_i, v_j) = |sum_i v_i / |v_i||^2.

    Args:
        embeddings: one row a face, or any other image; normalised inside.

    Raises:
        InputError: fewer than two rows, a row that is zero or not finite.
    """
    rows = _rows(embeddings, "embeddings")
    n = len(rows)
    if n < 2:
        raise InputError(f"embeddings have {n} row; give two or more to compare")
    total = unit_rows(rows, "embeddings").sum(axis=0)
    return float((total @ total - n) / (n * (n - 1)))


def layout_similarity(boxes: Float[np.ndarray, "n 4"], others: Float[np.ndarray, "m 4"]) -> float:
    """The largest sum of IoU over one-to-one matchings of two images' boxes, divided by max(n, m); in [0, 1].

    Two images without boxes have 1, so that drawing nothing is not diversity; one without against one with has 0. A
    box without area matches nothing. The convention is the project's, the paper states none.

    Args:
        boxes: x0, y0, x1, y1 in any unit.
        others: likewise, in the same unit.

    Raises:
        InputError: another shape, a box that is not finite, or x1 < x0 or y1 < y0.
    """
    return _layout_similarity(_boxes(boxes, "boxes"), _boxes(others, "others"))


def spatial_diversity(prompts: Sequence[Sequence[Float[np.ndarray, "_ 4"]]]) -> SpatialDiversity:
    """SDI = mean over prompts of 1 - mean_{i<p} sim(L_i, L_p), see `layout_similarity`.

    Args:
        prompts: for each prompt the boxes of each of its images, two images or more.

    Raises:
        InputError: no prompt, a prompt with fewer than two images, or boxes as `layout_similarity` refuses them.
    """
    if not len(prompts):
        raise InputError("there is no prompt; give the boxes of two or more images of each")
    values, empty, images = [], 0, 0
    for number, prompt in enumerate(prompts):
        layouts = [_boxes(boxes, f"boxes of image {i} of prompt {number}") for i, boxes in enumerate(prompt)]
        if len(layouts) < 2:
            raise InputError(f"prompt {number} has boxes of {len(layouts)} images; give two or more, or leave it out")
        pairs = [_layout_similarity(a, b) for i, a in enumerate(layouts) for b in layouts[i + 1 :]]
        values.append(1 - sum(pairs) / len(pairs))
        empty += sum(not len(layout) for layout in layouts)
        images += len(layouts)
    return SpatialDiversity(float(np.mean(values)), np.array(values), empty / images)


def tonal_statistics(images: Iterable[Any]) -> TonalStatistics:
    """Saturation, value and contrast of each image, the terms of `tonal_variation`.

    A pixel's saturation is (max - min) / max of its channels and 0 where it is black, its value is max, its grey is
    0.299 R + 0.587 G + 0.114 B.

    Args:
        images: arrays `height width 3` or tensors `3 height width`, each of its own size; uint8, or float in [0, 1].

    Raises:
        InputError: no image, another shape or type, or pixels outside [0, 1].
    """
    rows = [_tones(image, number) for number, image in enumerate(images)]
    if not rows:
        raise InputError("there is no image; give one or more")
    return TonalStatistics(*np.array(rows).T)


def tonal_variation(statistics: TonalStatistics, *, ddof: int = 0) -> TonalVariation:
    """PVS = std(saturation) + std(value) + std(contrast), over images.

    Args:
        statistics: of two images or more.
        ddof: the standard deviations divide by N - ddof. The paper does not say; 0 is the project's choice.

    Raises:
        InputError: three columns of unequal length, not finite, or no more images than `ddof` (fewer than two).
    """
    at_least("ddof", ddof, 0)
    columns = [as_numpy(column).astype(np.float64) for column in statistics]
    if len(columns) != 3 or columns[0].ndim != 1 or len({column.shape for column in columns}) != 1:
        shapes = ", ".join(str(column.shape) for column in columns)
        raise InputError(f"the statistics have shapes {shapes}; give three columns with one number an image")
    images = len(columns[0])
    if images < max(2, ddof + 1):
        raise InputError(f"there are statistics of {images} images; give {max(2, ddof + 1)} or more")
    bad = ~np.isfinite(columns).all(axis=0)
    if bad.any():
        raise InputError(f"image {int(bad.argmax())} has statistics that are not finite; leave it out")
    terms = [float(column.std(ddof=ddof)) for column in columns]
    return TonalVariation(sum(terms), *terms)


def artistic_coverage(
    train: Float[np.ndarray, "train dim"],
    test: Float[np.ndarray, "query dim"],
    generated: Float[np.ndarray, "query dim"],
) -> CoverageResult:
    """ASC = IRS_inf(generated) / IRS_inf(test), see `image_retrieval_score`.

    Needs as many queries as reference items or more to tell good generators apart: where nearly every query finds an
    item of its own, s* is the whole reference set.

    Args:
        train: embeddings of real images, the reference set.
        test: of other real images.
        generated: of as many generated ones.

    Raises:
        InputError: unequal numbers of queries, fewer than two, or as `image_retrieval_score`.
    """
    if len(test) != len(generated):
        raise InputError(f"test has {len(test)} rows, generated {len(generated)}; give equally many of both")
    if len(test) < 2:
        raise InputError(f"test and generated have {len(test)} rows; give two or more of each")
    real, ours = image_retrieval_score(train, test), image_retrieval_score(train, generated)
    return CoverageResult(ours.inf / real.inf, ours, real)


def image_retrieval_score(
    train: Float[np.ndarray, "train dim"],
    queries: Float[np.ndarray, "query dim"],
    *,
    chunk_size: int | None = None,
) -> RetrievalScore:
    """IRS: the reference items that are the nearest of at least one query, and the number that could be.

    Nearest by Euclidean distance between unit vectors, the lower index in a tie; in float64, in blocks of queries.

    Args:
        train: the reference set; normalised inside.
        queries: normalised inside.
        chunk_size: queries a block; by default as many as fit 128 MiB of similarities.

    Raises:
        InputError: no row on a side, another width, a row that is zero or not finite.
    """
    reference, asked = _rows(train, "train"), _rows(queries, "queries")
    n_query, n_train, blocks = score_blocks(None, asked, reference, chunk_size=chunk_size)
    learned = len(np.unique(np.concatenate([block.argmax(axis=1) for block in blocks])))
    reachable = reachable_count(learned, n_query, n_train)
    return RetrievalScore(learned, reachable, learned / n_train, reachable / n_train)


def reachable_count(learned: int, n_query: int, n_train: int) -> int:
    """s* = argmax over s in [k, n_train] of log s! - log (s - k)! - n log s, for k = `learned` and n = `n_query`.

    That is the probability that n uniform throws into s bins hit exactly k, up to a factor without s. The objective
    rises to a single peak, so its last rise is found by bisection; as s^n and (s + 1)^n have no common divisor, two s
    are equally likely for n = 1 only, where the lower one is given.

    Raises:
        InputError: `learned` is below 1, or above `n_query` or `n_train`.
    """
    for name, value in (("learned", learned), ("n_query", n_query), ("n_train", n_train)):
        at_least(name, value)
    if learned > min(n_query, n_train):
        raise InputError(
            f"learned is {learned}; {n_query} queries of {n_train} items hit {min(n_query, n_train)} at most"
        )
    if n_query == 1:
        return 1
    low, high = int(learned), int(n_train)
    while low < high:
        middle = (low + high) // 2
        # log of the ratio at middle + 1 and middle; log-gamma itself would lose the difference of large numbers
        rises = math.log1p(learned / (middle + 1 - learned)) > n_query * math.log1p(1 / middle)
        low, high = (middle + 1, high) if rises else (low, middle)
    return low


def _layout_similarity(boxes: Float[np.ndarray, "n 4"], others: Float[np.ndarray, "m 4"]) -> float:
    from scipy.optimize import linear_sum_assignment

    if not len(boxes) and not len(others):
        return 1.0
    corner = np.maximum(boxes[:, None, :2], others[None, :, :2])
    end = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    common = np.maximum(end - corner, 0).prod(axis=2)
    areas = [(sides[:, 2:] - sides[:, :2]).prod(axis=1) for sides in (boxes, others)]
    union = areas[0][:, None] + areas[1] - common
    iou = np.divide(common, union, out=np.zeros_like(common), where=union > 0)
    return float(iou[linear_sum_assignment(iou, maximize=True)].sum() / max(iou.shape))


def _rows(values: Any, name: str) -> Float[np.ndarray, "row dim"]:
    rows = as_rows(values, name).astype(np.float64)
    if not rows.size:
        raise InputError(f"{name} are of shape {rows.shape}; give one row or more")
    bad = ~np.isfinite(rows).all(axis=1)
    if bad.any():
        raise InputError(f"{name} row {int(bad.argmax())} is not finite; encode that item again or leave it out")
    return rows


def _boxes(boxes: Any, name: str) -> Float[np.ndarray, "n 4"]:
    try:
        values = as_numpy(boxes).astype(np.float64)
    except (TypeError, ValueError):
        raise InputError(f"{name} are no numbers; give a row x0, y0, x1, y1 for each") from None
    if not values.size and values.ndim <= 2:
        return np.zeros((0, 4))
    if values.ndim != 2 or values.shape[1] != 4:
        raise InputError(f"{name} have shape {values.shape}; give a row x0, y0, x1, y1 for each")
    bad = ~np.isfinite(values).all(axis=1)
    if bad.any():
        raise InputError(f"{name}: box {int(bad.argmax())} is not finite; leave it out")
    turned = (values[:, 2:] < values[:, :2]).any(axis=1)
    if turned.any():
        at = int(turned.argmax())
        numbers = ", ".join(f"{value:g}" for value in values[at])
        raise InputError(f"{name}: box {at} is ({numbers}); give x0, y0, x1, y1 with x1 >= x0 and y1 >= y0")
    return values


def _tones(image: Any, number: int) -> tuple[float, float, float]:
    channel = 0 if hasattr(image, "detach") else -1
    values = as_numpy(image)
    if values.ndim != 3 or values.shape[channel] != 3 or not values.size:
        raise InputError(
            f"image {number} has shape {values.shape}; give an array height x width x 3 or a tensor 3 x height x width"
        )
    if values.dtype.kind != "f" and values.dtype != np.uint8:
        raise InputError(f"image {number} is of {values.dtype}; give uint8, or float in [0, 1]")
    if values.dtype.kind == "f" and not (values.min() >= 0 and values.max() <= 1):  # false for NaN, too
        raise InputError(f"image {number} has pixels outside [0, 1] or NaN; scale it")
    scale = 1 if values.dtype.kind == "f" else 255
    red, green, blue = np.moveaxis(values, channel, 0).astype(np.float64) / scale
    high = np.maximum(np.maximum(red, green), blue)
    low = np.minimum(np.minimum(red, green), blue)
    saturation = np.divide(high - low, high, out=np.zeros_like(high), where=high > 0)
    grey = GREY[0] * red + GREY[1] * green + GREY[2] * blue
    return float(saturation.mean()), float(high.mean()), float(grey.std())
