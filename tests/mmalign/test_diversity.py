"""Diversity metrics against hand loops, exhaustive searches, and what must hold of any of them."""

from __future__ import annotations

import colorsys
import itertools
import math
import statistics
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmalign.errors import InputError
from mmalign.metrics import (
    HIGHER_IS_MORE_DIVERSE,
    TonalStatistics,
    artistic_coverage,
    diversity_values,
    identity_similarity,
    image_retrieval_score,
    layout_similarity,
    reachable_count,
    spatial_diversity,
    tonal_statistics,
    tonal_variation,
)
from mmalign.metrics.prompt_diversity import interval, number_groups, similarity_figures, tonal_figures


def rows(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / math.sqrt(a @ a) / math.sqrt(b @ b))


def mean_cosine(items: np.ndarray) -> float:
    return statistics.fmean(cosine(a, b) for a, b in itertools.combinations(items, 2))


# -- identity ----------------------------------------------------------------------------------------------------------


def test_identity_similarity_is_the_mean_over_pairs() -> None:
    faces = rows(0, 7, 5) * np.arange(1, 8)[:, None]
    assert identity_similarity(faces) == pytest.approx(mean_cosine(faces), abs=1e-14)
    assert identity_similarity(torch.from_numpy(faces).bfloat16()) == pytest.approx(mean_cosine(faces), abs=0.01)
    assert identity_similarity(np.eye(4)) == pytest.approx(0, abs=1e-15)
    assert identity_similarity([[1.0, 0], [-2.0, 0]]) == -1


def test_copies_raise_identity_similarity_to_one() -> None:
    faces = rows(1, 3, 8)
    before = identity_similarity(faces)
    more = identity_similarity(np.concatenate([faces, *[faces[:1]] * 5]))
    assert before < more < 1
    assert identity_similarity(np.repeat(faces[:1], 6, axis=0)) == pytest.approx(1, abs=1e-14)


@pytest.mark.parametrize(
    ("faces", "message"),
    [
        (np.ones((1, 3)), "embeddings have 1 row; give two or more"),
        (np.ones((0, 3)), r"of shape \(0, 3\); give one row or more"),
        (np.ones(3), "must be a matrix"),
        ([[1.0, 2], [math.nan, 1]], "row 1 contains NaN"),
        ([[1.0, 2], [math.inf, 1]], "row 1 is not finite"),
        ([[1.0, 2], [0, 0]], "row 1 is all zero"),
    ],
)
def test_faces_that_are_refused(faces: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        identity_similarity(faces)


# -- layout ------------------------------------------------------------------------------------------------------------


def random_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    corner = rng.uniform(0, 60, (count, 2))
    return np.concatenate([corner, corner + rng.uniform(5, 40, (count, 2))], axis=1)


def iou(a: np.ndarray, b: np.ndarray) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    common = max(width, 0) * max(height, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common
    return common / union


def best_matching(a: np.ndarray, b: np.ndarray) -> float:
    """All ways to give each box of the shorter list one of the longer."""
    short, long = sorted((a, b), key=len)
    if not len(long):
        return 1.0
    orders = itertools.permutations(long, len(short))
    return max(sum(map(iou, short, order)) for order in orders) / len(long)


def test_layout_similarity_is_that_of_the_best_matching() -> None:
    rng = np.random.default_rng(2)
    seen_greedy_fail = False
    for _ in range(60):
        a, b = random_boxes(rng, rng.integers(0, 6)), random_boxes(rng, rng.integers(0, 6))
        found = layout_similarity(a, b)
        assert found == pytest.approx(best_matching(a, b), abs=1e-12)
        assert layout_similarity(b[::-1] * 3, a * 3) == pytest.approx(found, abs=1e-12)
        in_order = sum(map(iou, a, b)) / max(len(a), len(b), 1)
        seen_greedy_fail |= found > in_order + 0.05
    assert seen_greedy_fail


def test_layouts_without_boxes_and_boxes_without_area() -> None:
    box = np.array([[0, 0, 10, 10]])
    assert layout_similarity(box, box) == 1
    assert layout_similarity([], np.zeros((0, 4))) == 1
    assert layout_similarity([], box) == layout_similarity(box, []) == 0
    assert layout_similarity([[3, 3, 3, 9]], [[3, 3, 3, 9]]) == 0


def test_spatial_diversity_is_a_mean_over_prompts_of_any_number_of_images() -> None:
    rng = np.random.default_rng(3)
    prompts = [[random_boxes(rng, n) for n in counts] for counts in ((2, 3), (0, 0, 1, 4), (0, 0))]
    found = spatial_diversity(prompts)
    wanted = [1 - statistics.fmean(best_matching(a, b) for a, b in itertools.combinations(p, 2)) for p in prompts]
    np.testing.assert_allclose(found.per_prompt, wanted, atol=1e-12)
    assert found.per_prompt[2] == 0, "nothing drawn is not diversity"
    assert found.sdi == pytest.approx(statistics.fmean(wanted))
    assert found.empty_share == 4 / 8


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "there is no prompt"),
        ([[[[0, 0, 1, 1]]]], "prompt 0 has boxes of 1 images; give two or more"),
        ([[[], []], [[], [[0, 0, 1, 1], [5, 0, 4, 1]]]], r"image 1 of prompt 1: box 1 is \(5, 0, 4, 1\)"),
        ([[[], [[0, 0, math.nan, 1]]]], "box 0 is not finite"),
        ([[[], [[0, 0, 1]]]], r"have shape \(1, 3\)"),
        ([[[], [0, 0, 1, 1]]], r"have shape \(4,\)"),
        ([[[], [[0, 0, 1, "a"]]]], "are no numbers"),
    ],
)
def test_boxes_that_are_refused(prompts: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        spatial_diversity(prompts)


# -- tones -------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(*[st.integers(0, 255)] * 3), min_size=4, max_size=4))
def test_tones_are_those_of_colorsys(pixels: list[tuple[int, int, int]]) -> None:
    image = np.array(pixels, np.uint8).reshape(2, 2, 3)
    found = tonal_statistics([image])
    hsv = [colorsys.rgb_to_hsv(*(channel / 255 for channel in pixel)) for pixel in pixels]
    assert found.saturation[0] == pytest.approx(statistics.fmean(s for _, s, _ in hsv), abs=1e-12)
    assert found.value[0] == pytest.approx(statistics.fmean(v for _, _, v in hsv), abs=1e-12)
    grey = [(0.299 * r + 0.587 * g + 0.114 * b) / 255 for r, g, b in pixels]
    assert found.contrast[0] == pytest.approx(statistics.pstdev(grey), abs=1e-9)


def test_every_kind_of_pixels_has_the_same_tones() -> None:
    array = np.random.default_rng(4).integers(0, 256, (5, 7, 3), np.uint8)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    kinds = [array, array / 255, tensor, tensor / 255, (tensor / 255).requires_grad_(), np.float32(array / 255)]
    for column in tonal_statistics(kinds):
        np.testing.assert_allclose(column, column[0], atol=1e-6)
    assert np.array(tonal_statistics([tensor.div(255).bfloat16()])).ravel() == pytest.approx(
        np.array(tonal_statistics([array])).ravel(), abs=0.01
    )
    batch = torch.stack([tensor, tensor.flip(0)])
    np.testing.assert_array_equal(tonal_statistics(batch), tonal_statistics([array, array[..., ::-1]]))


def test_tonal_variation_is_a_sum_of_standard_deviations() -> None:
    images = [np.random.default_rng(i).integers(0, 30 * i + 20, (6, 6, 3), np.uint8) for i in range(5)]
    tones = tonal_statistics(images)
    for ddof, deviation in ((0, statistics.pstdev), (1, statistics.stdev)):
        found = tonal_variation(tones, ddof=ddof)
        terms = [deviation(column.tolist()) for column in tones]
        assert found == pytest.approx((sum(terms), *terms), abs=1e-12)
    assert tonal_variation(tonal_statistics([images[0]] * 3)).pvs == pytest.approx(0, abs=1e-15)


def test_grey_images_vary_in_no_saturation() -> None:
    grey = [np.repeat(np.random.default_rng(i).integers(0, 60 + 40 * i, (4, 4, 1)), 3, 2) / 255 for i in range(4)]
    found = tonal_variation(tonal_statistics([*grey, np.zeros((2, 2, 3))]))
    assert found.saturation == 0
    assert found.value > 0.05
    assert found.contrast > 0.02
    assert found.pvs == found.value + found.contrast


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "there is no image"),
        ([np.zeros((3, 4, 5))], r"image 0 has shape \(3, 4, 5\)"),
        ([torch.zeros(4, 5, 3)], r"image 0 has shape \(4, 5, 3\)"),
        (np.zeros((4, 5, 3)), r"image 0 has shape \(5, 3\)"),
        ([np.zeros((0, 5, 3))], r"image 0 has shape \(0, 5, 3\)"),
        ([np.zeros((2, 2, 3), np.int64)], "is of int64"),
        ([np.zeros((2, 2, 3)), np.full((2, 2, 3), 1.5)], r"image 1 has pixels outside \[0, 1\]"),
        ([np.full((2, 2, 3), -1.0)], "outside"),
        ([np.full((2, 2, 3), math.nan)], "or NaN"),
    ],
)
def test_pixels_that_are_refused(images: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tonal_statistics(images)


def test_statistics_that_are_refused() -> None:
    one = np.zeros(1)
    with pytest.raises(InputError, match="statistics of 1 images; give 2 or more"):
        tonal_variation(TonalStatistics(one, one, one))
    with pytest.raises(InputError, match="give 3 or more"):
        tonal_variation(TonalStatistics(*np.zeros((3, 2))), ddof=2)
    with pytest.raises(InputError, match="ddof is -1"):
        tonal_variation(TonalStatistics(*np.zeros((3, 2))), ddof=-1)
    with pytest.raises(InputError, match=r"shapes \(1,\), \(1,\), \(2,\)"):
        tonal_variation(TonalStatistics(one, one, np.zeros(2)))
    with pytest.raises(InputError, match="image 1 has statistics that are not finite"):
        tonal_variation(TonalStatistics(np.zeros(2), np.array([0, math.nan]), np.zeros(2)))


# -- coverage ----------------------------------------------------------------------------------------------------------


def exact_reachable(learned: int, n_query: int, n_train: int) -> int:
    """argmax of s! / (s - k)! / s^n in fractions, the lowest of equals."""
    sizes = range(learned, n_train + 1)
    likelihood = [Fraction(math.perm(s, learned), s**n_query) for s in sizes]
    return sizes[max(range(len(sizes)), key=likelihood.__getitem__)]


def test_reachable_count_is_the_exact_maximum() -> None:
    for n_train in (1, 2, 7, 33):
        for n_query in range(1, 25):
            for learned in range(1, min(n_query, n_train) + 1):
                wanted = exact_reachable(learned, n_query, n_train)
                assert reachable_count(learned, n_query, n_train) == wanted, (learned, n_query, n_train)


@pytest.mark.parametrize(("learned", "n_query"), [(999, 1000), (990, 1000), (700, 1000), (200, 900)])
def test_reachable_count_is_a_peak_among_many(learned: int, n_query: int) -> None:
    found = reachable_count(learned, n_query, 10**6)

    def rises(s: int) -> bool:
        """Whether s + 1 is more likely than s, in whole numbers."""
        return (s + 1) * s**n_query > (s + 1 - learned) * (s + 1) ** n_query

    assert rises(found - 1)
    assert not rises(found)
    assert reachable_count(learned, n_query, found - 1) == found - 1, "cut off at the whole set"


def test_reachable_count_of_collapse_and_of_no_repetition() -> None:
    assert [reachable_count(1, n, 500) for n in (1, 2, 10, 10_000)] == [1, 1, 1, 1]
    assert reachable_count(20, 20, 5000) == 5000


def test_reachable_count_finds_the_number_of_bins() -> None:
    rng = np.random.default_rng(5)
    found = [reachable_count(len(np.unique(rng.integers(0, 300, 400))), 400, 5000) for _ in range(200)]
    assert statistics.fmean(found) == pytest.approx(300, rel=0.03)


@pytest.mark.parametrize("arguments", [(0, 5, 5), (6, 5, 9), (6, 9, 5), (1, 0, 5)])
def test_counts_that_are_refused(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(InputError, match=r"learned is|n_query is"):
        reachable_count(*arguments)


def test_retrieval_score_counts_the_nearest() -> None:
    train, queries = rows(6, 40, 4), rows(7, 60, 4) * np.linspace(0.1, 9, 60)[:, None]
    train[[11, 30]] = train[5]  # copies: the lowest counts
    nearest = set()
    for query in queries:
        similar = [round(cosine(query, item), 12) for item in train]
        nearest.add(similar.index(max(similar)))
    found = image_retrieval_score(train * 7, queries)
    assert found.learned == len(nearest)
    assert 5 in nearest
    assert not {11, 30} & nearest
    assert found.reachable == reachable_count(len(nearest), 60, 40)
    assert (found.alpha, found.inf) == (len(nearest) / 40, found.reachable / 40)
    assert image_retrieval_score(train, queries, chunk_size=7) == found


def test_coverage_of_as_good_as_real_and_of_collapse() -> None:
    train, real, other = rows(8, 100, 6), rows(9, 150, 6), rows(10, 150, 6)
    assert artistic_coverage(train, real, real[::-1]).asc == 1
    assert artistic_coverage(train, real, other).asc == pytest.approx(1, abs=0.2)
    collapsed = artistic_coverage(train, real, np.repeat(other[:1], 150, axis=0))
    assert (collapsed.generated.learned, collapsed.generated.reachable) == (1, 1)
    assert collapsed.asc == pytest.approx(1 / collapsed.test.reachable)
    half = artistic_coverage(train, real, np.concatenate([other[:10]] * 15))
    assert collapsed.asc < half.asc < 0.2


def test_coverage_that_is_refused() -> None:
    with pytest.raises(InputError, match="test has 3 rows, generated 4; give equally many"):
        artistic_coverage(rows(0, 5, 2), rows(1, 3, 2), rows(2, 4, 2))
    with pytest.raises(InputError, match="have 1 rows; give two or more"):
        artistic_coverage(rows(0, 5, 2), rows(1, 1, 2), rows(2, 1, 2))
    with pytest.raises(InputError, match="train are of shape"):
        image_retrieval_score(np.zeros((0, 2)), rows(1, 3, 2))
    with pytest.raises(InputError, match="3 dimensions, the gallery 2"):
        image_retrieval_score(rows(0, 5, 2), rows(1, 3, 3))
    with pytest.raises(InputError, match="queries row 1 is not finite"):
        image_retrieval_score(rows(0, 5, 2), [[1.0, 1], [math.inf, 0]])


# -- prompts -----------------------------------------------------------------------------------------------------------

GROUPS = ["a", "b", "a", "c", "b", "a", "d"]


def images(seed: int, n: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.uniform(0, rng.uniform(0.2, 1), (3, 4, 3)) * rng.uniform(0.3, 1, 3) for _ in range(n)]


def test_values_within_and_between_prompts() -> None:
    embeds, pixels = rows(11, 7, 5), images(12, 7)
    found = diversity_values(pixels, embeds, GROUPS)
    of = {g: embeds[[i for i, other in enumerate(GROUPS) if other == g]] for g in "abcd"}
    within = statistics.fmean([mean_cosine(of["a"]), mean_cosine(of["b"])])
    between = statistics.fmean(
        statistics.fmean(cosine(a, b) for a in of[g] for b in of[h]) for g, h in itertools.combinations("abcd", 2)
    )
    assert found["within_prompt_similarity"] == pytest.approx(within, abs=1e-12)
    assert found["between_prompt_similarity"] == pytest.approx(between, abs=1e-12)
    pvs, *terms = tonal_variation(tonal_statistics(pixels))
    names = ("tonal_variation", "saturation_variation", "value_variation", "contrast_variation")
    assert [found[name] for name in names] == [pvs, *terms]
    assert set(found) < set(HIGHER_IS_MORE_DIVERSE)
    numbers = torch.tensor(["abcd".index(g) for g in GROUPS])
    tensors = torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image in pixels])
    assert diversity_values(tensors, torch.from_numpy(embeds), numbers) == pytest.approx(found, abs=1e-12)


def test_what_cannot_be_had_is_left_out() -> None:
    embeds, pixels = rows(13, 3, 5), images(14, 3)
    assert list(diversity_values(None, embeds)) == ["within_prompt_similarity"]
    assert list(diversity_values(None, embeds, [0, 1, 2])) == ["between_prompt_similarity"]
    assert diversity_values(pixels[:1], embeds[:1]) == {}
    assert diversity_values(pixels, None, [0, 0, 1])["tonal_variation"] > 0


def test_one_look_for_each_prompt() -> None:
    embeds = np.repeat(rows(15, 3, 6), 4, axis=0)
    found = diversity_values(None, embeds, np.repeat(["x", "y", "z"], 4))
    assert found["within_prompt_similarity"] == pytest.approx(1)
    assert found["between_prompt_similarity"] == pytest.approx(identity_similarity(embeds[::4]), abs=1e-12)


def test_values_that_are_refused() -> None:
    with pytest.raises(InputError, match="neither pixels nor embeds"):
        diversity_values(None, None)
    with pytest.raises(InputError, match="groups are 2 for 3 images"):
        diversity_values(None, rows(0, 3, 2), ["a", "b"])
    with pytest.raises(InputError, match="embeds have 2 rows for 3 images"):
        diversity_values(images(0, 3), rows(0, 2, 2))
    with pytest.raises(InputError, match="embeds row 1 is not finite"):
        diversity_values(None, [[1.0, 1], [math.inf, 0]])


def test_resampled_figures_are_those_of_the_resampled_images() -> None:
    """A prompt that is drawn twice is there twice; copies of one prompt make no pair between prompts."""
    embeds, tones = rows(16, 7, 5), tonal_statistics(images(17, 7))
    numbers, _ = number_groups(GROUPS, 7)
    figures = similarity_figures(embeds, numbers) | tonal_figures(tones, numbers)
    for draw in ([2, 0, 1, 1], [1, 3, 0, 0], [1, 1, 1, 1], [0, 2, 0, 2]):
        found = {name: float(figure.resampled(np.array([draw], float))[0]) for name, figure in figures.items()}
        prompts = [number for number, times in enumerate(draw) for _ in range(times)]
        members = [np.flatnonzero(numbers == number) for number in prompts]
        within = [mean_cosine(embeds[of]) for of in members if len(of) > 1]
        pairs = [
            statistics.fmean(cosine(embeds[i], embeds[j]) for i in members[p] for j in members[q])
            for p, q in itertools.combinations(range(len(prompts)), 2)
            if prompts[p] != prompts[q]
        ]
        chosen = np.concatenate(members)
        pvs = tonal_variation(TonalStatistics(*(column[chosen] for column in tones)))
        assert found["within_prompt_similarity"] == pytest.approx(statistics.fmean(within), abs=1e-12)
        assert found["between_prompt_similarity"] == pytest.approx(statistics.fmean(pairs), abs=1e-12)
        assert found["tonal_variation"] == pytest.approx(pvs.pvs, abs=1e-12)
        assert found["contrast_variation"] == pytest.approx(pvs.contrast, abs=1e-12)


def test_intervals_cover_and_are_narrower_for_more_prompts() -> None:
    widths = []
    for prompts in (10, 160):
        numbers = np.repeat(np.arange(prompts), 3)
        spread = np.random.default_rng(1).uniform(0.1, 2, prompts)
        embeds = np.repeat(rows(18, prompts, 6), 3, axis=0) + rows(19, 3 * prompts, 6) * spread[numbers, None]
        figure = similarity_figures(embeds, numbers)["within_prompt_similarity"]
        low, high = interval(figure, prompts, resamples=800, seed=0) or (0, 0)
        assert low < figure.value < high
        assert interval(figure, prompts, resamples=800, seed=0) == (low, high)
        assert figure.per_prompt is not None
        error = figure.per_prompt.std() / math.sqrt(prompts)
        assert high - low == pytest.approx(2 * 1.96 * error, rel=0.2)
        widths.append(high - low)
    assert widths[1] < widths[0] / 2
    two = similarity_figures(rows(20, 4, 3), np.array([0, 0, 1, 1]))["within_prompt_similarity"]
    assert interval(two, 2, resamples=100, seed=0) is None
    assert interval(figure, 160, resamples=0, seed=0) is None
