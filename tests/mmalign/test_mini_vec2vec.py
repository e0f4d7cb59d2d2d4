"""mini-vec2vec in worlds whose answer is known; its stages against loops and exhaustive search."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import rankdata
from sklearn.cluster import KMeans
from torch import Tensor
from torch.nn.functional import normalize

from mmalign.errors import InputError
from mmalign.mini_vec2vec import (
    MiniVec2Vec,
    _clustered,
    anchor_kernel,
    fit_mini_vec2vec,
    frame,
    match_clusters,
    paired_metrics,
    pseudo_targets,
    refine_by_neighbours,
    relative_similarity,
)

SMALL: dict[str, Any] = {
    "runs": 4,
    "clusters": 20,
    "restarts": 30,
    "neighbours": 20,
    "refine_steps": 8,
    "refine_sample": 400,
    "refine_neighbours": 20,
    "refine_clusters": 60,
}


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def world(d: int = 16, wider: int = 0, modes: int = 20) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unpaired rows of two spaces that are each other's rotation, and held-out pairs. `wider`: extra columns of b."""
    rng = torch.Generator().manual_seed(1)
    centres = torch.randn(modes, d, generator=rng)
    turn = torch.linalg.qr(torch.randn(d + wider, d + wider, generator=rng))[0][:d]

    def items(n: int) -> Tensor:
        return centres[torch.randint(modes, (n,), generator=rng)] + 0.3 * torch.randn(n, d, generator=rng)

    held_out = items(200)
    return items(1000), items(900) @ turn + 0.5, held_out, held_out @ turn + 0.5


def evaluate(model: MiniVec2Vec, a: Tensor, b: Tensor) -> float:
    return paired_metrics(model.map_a(a), model.frame_b(b)).top1


@pytest.fixture(scope="module")
def fitted() -> MiniVec2Vec:
    a, b, _, _ = world()
    return fit_mini_vec2vec(a, b, **SMALL)


def test_a_rotation_is_found_without_pairs(fitted: MiniVec2Vec) -> None:
    _, _, held_a, held_b = world()
    assert evaluate(fitted, held_a, held_b) > 0.9
    back = normalize(fitted.frame_b(held_b) @ fitted.matrix.T, dim=1)
    assert paired_metrics(back, frame(held_a)[0]).top1 > 0.9
    assert fitted.confidence["matching_max"] > 0.95
    assert fitted.confidence["split_agreement"] > 0.5
    assert 0 < fitted.confidence["singular_value_min"] <= fitted.confidence["singular_value_max"] <= 1 + 1e-5


@pytest.mark.parametrize("wider", [6, -6])
def test_widths_may_differ(wider: int) -> None:
    if wider > 0:
        a, b, held_a, held_b = world(wider=wider)
    else:
        b, a, held_b, held_a = world(wider=-wider)
    model = fit_mini_vec2vec(a, b, **SMALL, orthogonal=True)
    assert model.matrix.shape == (a.shape[1], b.shape[1])
    assert evaluate(model, held_a, held_b) > 0.9
    np.testing.assert_allclose(torch.linalg.svdvals(model.matrix), 1, atol=1e-5)


def test_a_cloud_without_modes_gives_no_confidence() -> None:
    model = fit_mini_vec2vec(randn(600, 16, seed=1), randn(600, 16, seed=2), **SMALL | {"refine_steps": 0})
    assert abs(model.confidence["split_agreement"]) < 0.3
    assert model.confidence["matching_max"] < 0.95


def test_seeds_decide_everything() -> None:
    a, b, _, _ = world()
    small = SMALL | {"runs": 2, "restarts": 2, "refine_steps": 2}
    np.random.seed(0)
    torch.manual_seed(0)
    first = fit_mini_vec2vec(a.double(), b.double(), **small)
    np.random.seed(1)
    torch.manual_seed(1)
    again, other = (fit_mini_vec2vec(a.double(), b.double(), **small, seed=seed) for seed in (0, 1))
    assert first.matrix.dtype == torch.float64
    np.testing.assert_array_equal(first.matrix, again.matrix)
    assert first.confidence == again.confidence
    assert not torch.equal(first.matrix, other.matrix)


def test_matching_finds_the_best_of_all_permutations() -> None:
    centres = randn(6, 4, seed=0)
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    left, right = anchor_kernel(centres), anchor_kernel(centres[order] + 0.1 * randn(6, 4, seed=1) + 7)
    found, objective = match_clusters(left, right, restarts=60, seed=0)
    best = max(float((left * right[list(perm)][:, list(perm)]).sum()) for perm in permutations(range(6)))
    assert objective == pytest.approx(best)
    np.testing.assert_array_equal(found, order.argsort())


def test_pseudo_targets_are_means_of_relative_neighbours() -> None:
    x, y, anchors_x, anchors_y = randn(7, 5, seed=0), randn(11, 4, seed=1), randn(9, 5, seed=2), randn(9, 4, seed=3)
    pairs = pseudo_targets(x, y, anchors_x, anchors_y, 3, block=2)
    similarity = relative_similarity(x, y, anchors_x, anchors_y)

    def cosines(row: Tensor, anchors: Tensor) -> Tensor:
        return torch.stack([torch.cosine_similarity(row, anchor, dim=0) for anchor in anchors])

    for i in range(7):
        by_hand = [
            float(torch.cosine_similarity(cosines(x[i], anchors_x), cosines(y[j], anchors_y), dim=0)) for j in range(11)
        ]
        np.testing.assert_allclose(similarity[i], by_hand, atol=1e-5)
        best = sorted(range(11), key=lambda j: -by_hand[j])[:3]
        assert pairs.neighbours[i].tolist() == best
        np.testing.assert_allclose(pairs.targets[i], y[best].mean(0), atol=1e-6)
        np.testing.assert_allclose(pairs.similarity[i], sorted(by_hand)[::-1][:3], atol=1e-5)


def test_a_step_averages_the_map_with_the_new_solution() -> None:
    x, y, matrix = randn(30, 5, seed=0), randn(40, 5, seed=1), torch.eye(5)
    step = refine_by_neighbours(x, y, matrix, 4, alpha=0.25)
    for row, target in zip(x, step.targets, strict=True):
        nearest = torch.cosine_similarity(row.unsqueeze(0), y).topk(4).indices
        np.testing.assert_allclose(target, y[nearest].mean(0), atol=1e-6)
    np.testing.assert_allclose(step.matrix, 0.75 * matrix + 0.25 * step.step, atol=1e-6)
    np.testing.assert_allclose(step.step @ step.step.T, torch.eye(5), atol=1e-5)


def test_clusters_are_as_tight_as_those_of_scikit_learn() -> None:
    x, _ = frame(world()[0])
    ours = _clustered(x, 20, np.random.default_rng(0), 5)
    theirs = KMeans(20, n_init=5, random_state=0).fit(x.numpy())
    assert float(torch.cdist(x, ours).min(1).values.square().sum()) < 1.1 * theirs.inertia_


def test_paired_metrics_by_ranks() -> None:
    target = randn(25, 6, seed=0)
    mapped = target + 0.8 * randn(25, 6, seed=1)
    cosine = normalize(mapped, dim=1) @ normalize(target, dim=1).T
    ranks = np.array([rankdata(-row)[i] for i, row in enumerate(cosine.numpy())])
    found = paired_metrics(mapped, target, block=4)
    assert found.mean_cosine == pytest.approx(float(cosine.diagonal().mean()), abs=1e-6)
    assert found.top1 == pytest.approx((ranks == 1).mean())
    assert 0 < found.top1 < 1
    assert found.mean_rank == pytest.approx(ranks.mean())
    assert found.foscttm == pytest.approx(((ranks - 1) / 24).mean())


def test_counts_shrink_to_what_few_rows_allow() -> None:
    a, b, _, _ = world(modes=3)
    model = fit_mini_vec2vec(a[:30], b[:24], runs=2, clusters=3, refine_steps=2)
    assert model.matrix.isfinite().all()
    assert set(model.confidence) >= {"split_agreement", "mapped_similarity"}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"clusters": 600}, "rows_per_run is 1000; give 1200 or more"),
        ({"clusters": 500}, "clusters is 500, and b has 900 rows"),
        ({"refine_clusters": -1}, "refine_clusters is -1"),
        ({"refine_neighbours": 0}, "refine_neighbours is 0"),
        ({"alpha": 0}, "alpha is 0"),
        ({"alpha": 1.5}, "alpha is 1.5"),
        ({"runs": 0}, "runs is 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(change: dict[str, Any], match: str) -> None:
    a, b, _, _ = world()
    with pytest.raises(InputError, match=match):
        fit_mini_vec2vec(a, b, **SMALL | {"rows_per_run": 1000} | change)


def test_rows_that_cannot_be_used_are_refused() -> None:
    a, b, _, _ = world()
    b[3] = torch.nan
    with pytest.raises(InputError, match="b row 3 holds NaN"):
        fit_mini_vec2vec(a, b, **SMALL)
    with pytest.raises(InputError, match="mapped has width 16, target 15"):
        paired_metrics(a, a[:, :15])
    with pytest.raises(InputError, match=r"shapes \(3, 3\) and \(4, 4\)"):
        match_clusters(torch.eye(3), torch.eye(4))
