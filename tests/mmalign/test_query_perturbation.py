"""Query perturbation against singular vectors, loops over tokens and drawn rectangles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mmalign.errors import InputError
from mmalign.imaging import ImagePreprocessing
from mmalign.query_perturbation import (
    PatchGrid,
    boxes_to_token_weights,
    contrastive_scores,
    mean_projector,
    object_projector,
    perturbed_keys,
    perturbed_queries,
    token_weights,
    two_stage_scores,
)

HEADS, TOKENS, D = 3, 20, 6


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cover(*tokens: int, total: int = TOKENS, seed: int = 1) -> Tensor:
    """Weights that cover some tokens, more or less."""
    weights = torch.zeros(total, dtype=torch.float64)
    weights[list(tokens)] = 0.2 + 0.8 * torch.rand(len(tokens), generator=torch.Generator().manual_seed(seed)).double()
    return weights


def by_singular_vectors(keys: Tensor, weights: Tensor, energy: float, rank: int | None) -> tuple[np.ndarray, int]:
    """The projector of one head, and its rank."""
    rows = (weights[:, None] * keys).numpy()
    _, values, right = np.linalg.svd(rows, full_matrices=False)
    powers = values**2
    r, total = 0, 0.0
    for power in powers:
        total += power
        if total / powers.sum() < energy:
            r += 1
    r = max(1, r) if rank is None else rank
    r = min(r, int((powers > 1e-10 * powers[0]).sum()))
    return right[:r].T @ right[:r], r


@pytest.mark.parametrize("covered", [(3,), (1, 4, 5), (2, 3, 4, 5, 6), tuple(range(4, 10)), tuple(range(1, 15))])
@pytest.mark.parametrize("rule", [{"energy": 0.99}, {"energy": 0.6}, {"rank": 2}, {"rank": 6}])
def test_projector_is_that_of_the_leading_singular_vectors(covered: tuple[int, ...], rule: dict) -> None:
    keys, weights = draw(HEADS, TOKENS, D), cover(*covered)
    found = object_projector(keys, weights, **rule)
    for head in range(HEADS):
        expected, r = by_singular_vectors(keys[head], weights, rule.get("energy", 0.99), rule.get("rank"))
        assert found.rank[head] == r <= min(len(covered), D)
        np.testing.assert_allclose(found.projector[head], expected, atol=1e-10)
        values = np.linalg.svd((weights[:, None] * keys[head]).numpy(), compute_uv=False) ** 2
        padded = np.pad(values, (0, max(0, D - len(values))))[:D]
        np.testing.assert_allclose(found.eigenvalues[head], padded, atol=1e-10)
    torch.testing.assert_close(found.projector @ found.projector, found.projector)


def test_energy_that_is_just_reached_is_enough() -> None:
    """r counts shares strictly below eta; both ways of decomposing, on numbers without rounding."""
    unit = torch.eye(6, dtype=torch.float64)
    twice = unit[[0, 0, 1, 2]][None, :, :3]  # eigenvalues 2, 1, 1: shares 1/2, 3/4, 1
    found = object_projector(twice, torch.ones(4), energy=0.75)
    assert found.eigenvalues.tolist() == [[2, 1, 1]]
    assert found.rank.tolist() == [1]
    equal = unit[None, :4]  # fewer tokens than dimensions; eigenvalues 1, 1, 1, 1
    found = object_projector(equal, torch.ones(4), energy=0.5)
    assert found.eigenvalues.tolist() == [[1, 1, 1, 1, 0, 0]]
    assert found.rank.tolist() == [1]


@pytest.mark.parametrize("tokens", [(0, 1), tuple(range(8))])
def test_rank_is_not_more_than_keys_are_independent(tokens: tuple[int, ...]) -> None:
    keys = draw(1, 1, D)[:, [0] * TOKENS] * torch.arange(1, TOKENS + 1)[:, None]  # all of one direction
    weights = torch.zeros(TOKENS, dtype=torch.float64)
    weights[list(tokens)] = 1
    found = object_projector(keys, weights, rank=2)
    assert found.rank.tolist() == [1]
    along = torch.nn.functional.normalize(keys[0, 0], dim=0)
    torch.testing.assert_close(found.projector[0], along[:, None] * along, atol=1e-10, rtol=0)


def test_small_eigenvalues_keep_their_directions() -> None:
    """The Gram matrix of few tokens loses digits of small eigenvalues, not of the subspace."""
    basis = torch.linalg.qr(draw(D, D)).Q[:3]
    keys = (basis * torch.tensor([1.0, 1e-2, 1e-4], dtype=torch.float64)[:, None]).expand(1, 3, D)
    mixed = torch.linalg.qr(draw(3, 3, seed=2)).Q @ keys
    found = object_projector(mixed, torch.ones(3, dtype=torch.float64), rank=3)
    assert found.rank.tolist() == [3]
    torch.testing.assert_close(found.projector[0], basis.T @ basis, atol=1e-9, rtol=0)


def test_one_token_counts_whole_however_little_of_it_is_covered() -> None:
    keys = draw(HEADS, TOKENS, D)
    direction = keys[:, 7] / keys[:, 7].norm(dim=-1, keepdim=True)
    for fraction in (1e-3, 0.4, 1.0):
        weights = torch.zeros(TOKENS, dtype=torch.float64)
        weights[7] = fraction
        found = object_projector(keys, weights)
        torch.testing.assert_close(found.projector, direction[:, :, None] * direction[:, None])


def test_fractions_count_where_there_are_several_tokens() -> None:
    keys = draw(HEADS, TOKENS, D)
    weights = cover(3, 4, 5)
    assert not torch.allclose(
        object_projector(keys, weights, rank=1).projector, object_projector(keys, (weights > 0).double(), rank=1)[0]
    )


def test_mean_over_objects_by_hand() -> None:
    keys, other = draw(HEADS, TOKENS, D), draw(HEADS, TOKENS, D, seed=5)
    objects = torch.stack([cover(1, 2, 3), torch.zeros(TOKENS).double(), cover(*range(4, 16)), cover(9)])
    fewer = torch.stack([cover(5), *torch.zeros(3, TOKENS).double()])
    alpha = torch.tensor([[2.0, 9.0, -1.0, 4.0], [3.0, 7.0, 7.0, 7.0]], dtype=torch.float64)
    mean = mean_projector(torch.stack([keys, other]), torch.stack([objects, fewer]), alpha)
    parts = [object_projector(keys, objects[place]).projector for place in (0, 2, 3)]
    torch.testing.assert_close(mean[0], (2 * parts[0] - parts[1] + 4 * parts[2]) / 3)
    torch.testing.assert_close(mean[1], 3 * object_projector(other, fewer[0]).projector)
    # Alone, and with the batch's largest object away, it is the same to rounding.
    torch.testing.assert_close(mean_projector(other, fewer[:1], 3.0), mean[1], atol=1e-12, rtol=0)
    once, twice = (mean_projector(keys, objects[:1].repeat(times, 1)) for times in (1, 2))
    torch.testing.assert_close(once, twice, atol=1e-12, rtol=0)


def test_no_objects_leave_queries_as_they_are() -> None:
    keys, queries = draw(2, HEADS, TOKENS, D), draw(2, HEADS, 4, D, seed=3).float()
    for objects in (torch.zeros(2, 0, TOKENS), torch.zeros(2, 3, TOKENS)):
        mean = mean_projector(keys.float(), objects)
        assert not mean.any()
        assert mean.dtype == torch.float32
        for keep_norm in (False, True):
            assert torch.equal(perturbed_queries(queries, mean, keep_norm=keep_norm), queries)
    assert object_projector(keys, torch.zeros(2, TOKENS)).rank.tolist() == [[0] * HEADS] * 2


def test_keys_of_zeros_span_nothing() -> None:
    found = object_projector(torch.zeros(HEADS, TOKENS, D), torch.ones(TOKENS))
    assert not found.rank.any()
    assert not found.projector.any()


@pytest.mark.parametrize("covered", [(1, 4, 5), tuple(range(1, 15))])
def test_signs_and_order_of_eigenvectors_do_not_matter(
    covered: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, weights = draw(HEADS, TOKENS, D), cover(*covered)
    usual = object_projector(keys, weights).projector
    mixed = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(object_projector(keys[:, mixed], weights[mixed]).projector, usual, atol=1e-12, rtol=0)
    eigh, calls = torch.linalg.eigh, []

    def other_signs(matrix: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = eigh(matrix)
        calls.append(matrix.shape)
        return values, vectors * (1 - 2.0 * (torch.arange(vectors.shape[-1]) % 2))

    monkeypatch.setattr(torch.linalg, "eigh", other_signs)
    torch.testing.assert_close(object_projector(keys, weights).projector, usual, atol=1e-12, rtol=0)
    assert calls[0][-1] == min(len(covered), D)  # of few tokens, their Gram matrix


def test_queries_by_hand() -> None:
    keys, queries = draw(HEADS, TOKENS, D), draw(HEADS, 4, D, seed=3)
    mean = mean_projector(keys, torch.stack([cover(1, 2, 3), cover(9)]), 5.0)
    turned = perturbed_queries(queries, mean)
    kept = perturbed_queries(queries, mean, keep_norm=True)
    for head in range(HEADS):
        for place in range(4):
            q = queries[head, place]
            expected = q + q @ mean[head]
            torch.testing.assert_close(turned[head, place], expected)
            torch.testing.assert_close(kept[head, place], expected * q.norm() / expected.norm())
    torch.testing.assert_close(turned @ keys.mT, queries @ perturbed_keys(keys, mean).mT)
    zero = torch.zeros_like(queries)
    assert torch.equal(perturbed_queries(zero, mean, keep_norm=True), zero)


def test_half_precision_goes_through_double() -> None:
    keys, queries = draw(HEADS, TOKENS, D).bfloat16(), draw(HEADS, 4, D, seed=3).bfloat16()
    mean = mean_projector(keys, cover(1, 2, 3)[None])
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean, mean_projector(keys.double(), cover(1, 2, 3)[None]).float())
    turned = perturbed_queries(queries, mean)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, (queries.float() + queries.float() @ mean).bfloat16())


def test_gradients_pass_queries_and_take_projectors_as_given() -> None:
    keys, queries = draw(1, 5, 3).requires_grad_(), draw(1, 2, 3, seed=3).requires_grad_()
    mean = mean_projector(keys, cover(1, 2, total=5)[None])
    assert not mean.requires_grad
    perturbed_queries(queries, mean).sum().backward()
    torch.testing.assert_close(queries.grad, (torch.eye(3) + mean).sum(dim=-1).expand(1, 2, 3))


def test_attention_goes_to_the_object_and_not_because_it_is_sharper() -> None:
    """The methods card's synthetic layer (sections 4 and 10): 257 tokens, the object in 12, 50 draws."""
    n, d, alpha = 257, 64, 8.0
    weights = torch.zeros(1, n)
    weights[0, 40:52] = 1
    masses: dict[str, list[float]] = {"plain": [], "perturbed": [], "sharpened": [], "turned": []}
    for seed in range(50):
        keys, queries = draw(1, n, d, seed=seed), draw(1, 4, d, seed=1000 + seed)
        projector = mean_projector(keys, weights, alpha)
        r = object_projector(keys, weights[0]).rank.item()
        asked = {
            "plain": queries,
            "perturbed": perturbed_queries(queries, projector),
            "sharpened": (1 + alpha * r / d) * queries,
            "turned": perturbed_queries(queries, projector, keep_norm=True),
        }
        for name, q in asked.items():
            attention = (q @ keys.mT / d**0.5).softmax(dim=-1)
            masses[name].append(attention[..., 40:52].sum(dim=-1).mean().item())
    means = {name: float(np.mean(values)) for name, values in masses.items()}
    assert means["plain"] == pytest.approx(12 / 257, abs=0.01)
    assert means["sharpened"] == pytest.approx(means["plain"], abs=0.015)
    assert means["perturbed"] > 1.5 * max(means["plain"], means["sharpened"])
    assert means["turned"] > 1.2 * means["plain"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"energy": 1.0}, "energy is 1.0"),
        ({"energy": float("nan")}, "energy is nan"),
        ({"rank": 0}, "rank is 0"),
        ({"alpha": float("inf")}, "alpha is inf"),
        ({"alpha": torch.ones(2)}, "alpha is tensor"),
        ({"token_weights": torch.ones(1, TOKENS + 1)}, "do not fit keys"),
        ({"token_weights": torch.full((1, TOKENS), torch.nan)}, "token weights must be finite, 0 or more"),
        ({"token_weights": torch.full((1, TOKENS), torch.inf)}, "token weights must be finite"),
        ({"token_weights": torch.full((1, TOKENS), -0.5)}, "token weights must be finite"),
        ({"keys": torch.full((HEADS, TOKENS, D), torch.nan)}, "keys are not finite"),
    ],
)
def test_what_cannot_be_used_is_said(given: dict, message: str) -> None:
    usual = {"keys": draw(HEADS, TOKENS, D), "token_weights": cover(1)[None]}
    with pytest.raises(InputError, match=message):
        mean_projector(**{**usual, **given})


# -- boxes -------------------------------------------------------------------------------------------------------------


def test_token_weights_count_pixels() -> None:
    """Boxes of whole pixels, painted and counted patch by patch; a remainder right and below belongs to no token."""
    grid = PatchGrid(rows=3, columns=4, patch_height=5, patch_width=8, prefix=2)
    boxes = [[0, 0, 8, 5], [3, 2, 21, 13], [30, 11, 35, 18], [9, 6, 9, 9], [0, 0, 35, 18]]
    weights = token_weights(torch.tensor(boxes), grid)
    assert weights.shape == (5, grid.tokens) == (5, 14)
    assert not weights[:, :2].any()
    for row, (x0, y0, x1, y1) in zip(weights, boxes, strict=True):
        painted = np.zeros((18, 35))
        painted[y0:y1, x0:x1] = 1
        for place in range(12):
            top, left = place // 4 * 5, place % 4 * 8
            assert row[2 + place] == pytest.approx(painted[top : top + 5, left : left + 8].mean())
    half = token_weights(torch.tensor([[0.0, 0.0, 2.0, 2.5]]), grid)
    assert half[0, 2] == pytest.approx(1 / 8)


PREPROCESSINGS = {
    "squash": ImagePreprocessing((96, 96), "squash", mean=(0, 0, 0), std=(1, 1, 1), interpolation="bilinear"),
    "crop": ImagePreprocessing((96, 96), "shortest", mean=(0, 0, 0), std=(1, 1, 1), interpolation="bilinear"),
    "larger, then crop": ImagePreprocessing(
        (80, 64), "shortest", 96, mean=(0, 0, 0), std=(1, 1, 1), interpolation="bilinear"
    ),
    "covering, then crop": ImagePreprocessing(
        (80, 64), "shortest", (100, 70), mean=(0, 0, 0), std=(1, 1, 1), interpolation="bilinear"
    ),
    "pad": ImagePreprocessing((96, 96), "longest", mean=(0, 0, 0), std=(1, 1, 1), interpolation="bilinear"),
    "squash, then crop": ImagePreprocessing(
        (90, 84), "squash", (96, 100), mean=(0, 0, 0), std=(1, 1, 1), interpolation="bilinear"
    ),
}


@pytest.mark.parametrize("preprocessing", PREPROCESSINGS.values(), ids=PREPROCESSINGS)
@pytest.mark.parametrize("size", [(240, 150), (131, 217), (300, 300)])
@pytest.mark.parametrize("box", [(0.3, 0.35, 0.6, 0.62), (0.02, 0.4, 0.5, 0.97), (0.0, 0.0, 1.0, 1.0)])
def test_boxes_go_where_the_pixels_go(preprocessing: ImagePreprocessing, size: tuple, box: tuple) -> None:
    """A white rectangle on black is looked for in what the preprocessing makes of the image."""
    width, height = size
    x0, x1 = round(box[0] * width), round(box[2] * width)
    y0, y1 = round(box[1] * height), round(box[3] * height)
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[:, y0:y1, x0:x1] = 255
    seen = preprocessing(image)[0] > 0.5
    columns, rows = seen.any(dim=0).nonzero().flatten(), seen.any(dim=1).nonzero().flatten()
    found = [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]
    mapped = preprocessing.map_boxes(torch.tensor([[x0, y0, x1, y1]]), height, width)[0]
    np.testing.assert_allclose(mapped, found, atol=1.0)


def test_what_is_cropped_away_is_empty() -> None:
    crop = ImagePreprocessing((50, 50), "shortest", mean=(0, 0, 0), std=(1, 1, 1))
    boxes = torch.tensor([[0, 0, 40, 100], [0, 0, 60, 100], [-30, -20, 500, 500], [100, 20, 120, 40]])
    mapped = crop.map_boxes(boxes, 100, 200)  # what is left is x from 50 to 150
    assert mapped.tolist() == [[0, 0, 0, 50], [0, 0, 5, 50], [0, 0, 50, 50], [25, 10, 35, 20]]
    pad = ImagePreprocessing((50, 50), "longest", mean=(0, 0, 0), std=(1, 1, 1))
    assert pad.map_boxes(boxes[2:3], 100, 200).tolist() == [[0, 12, 50, 37]]
    weights = boxes_to_token_weights(boxes, (200, 100), crop, PatchGrid(5, 5, 10, 10, 1))
    assert weights.any(dim=1).tolist() == [False, True, True, True]
    assert weights[2, 1:].tolist() == [1.0] * 25
    with pytest.raises(InputError, match="boxes have shape"):
        crop.map_boxes(torch.zeros(4), 100, 200)


# -- scores ------------------------------------------------------------------------------------------------------------


def test_scores_by_hand() -> None:
    queries, texts = draw(5, 3, 4), draw(7, 4, seed=1)
    contrastive = contrastive_scores(queries, texts)
    for image in range(5):
        for text in range(7):
            expected = max(float(query @ texts[text]) for query in queries[image])
            assert contrastive[image, text].item() == pytest.approx(expected)
    match = 10 * draw(5, 7, seed=2)
    scores = two_stage_scores(contrastive, match, 3)
    for image in range(5):
        best = sorted(range(7), key=lambda text: -contrastive[image, text])[:3]
        for text in range(7):
            expected = contrastive[image, text] + match[image, text] if text in best else -100
            assert scores[image, text].item() == pytest.approx(float(expected))
    torch.testing.assert_close(two_stage_scores(contrastive, match, 99), contrastive + match)
    with pytest.raises(InputError, match="k is 0"):
        two_stage_scores(contrastive, match, 0)
    with pytest.raises(InputError, match="matrices of one shape"):
        two_stage_scores(contrastive, match[:2], 3)
