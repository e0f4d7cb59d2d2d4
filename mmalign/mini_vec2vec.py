"""A linear map between two embedding spaces from unpaired rows: mini-vec2vec, arXiv 2510.02348.

Clusters of both sides are matched by their mutual geometry alone (stage 1), rows are matched by their similarities to
the matched clusters (stage 2), and the map is refined (stage 3 by neighbours, stage 4 by clusters). The stages are
functions here; `fit_mini_vec2vec` runs them. Rows are samples and targets are y ~ x W.

Weak evidence beyond text encoders: between images and texts the result is only coarse (arXiv 2610.09411 reports a mean
FOSCTTM of 0.22, with 0 perfect and 0.5 chance), and refinement from a bad start makes it worse. Between compatible text
encoders, some 50 true pairs with `mmalign.closed_forms` do nearly as well. Use it as a start before a few pairs, and
look at the confidence it reports.

Different widths need no padding: every Procrustes step is semi-orthogonal, which is what zero columns would give.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.cluster.vq import kmeans2
from scipy.optimize import quadratic_assignment
from torch import Tensor
from torch.nn.functional import normalize

from .checks import at_least, in_range
from .closed_forms import procrustes
from .errors import InputError
from .progress import progress_bar
from .representation_similarity import check_pairs, check_rows

__all__ = [
    "MiniVec2Vec",
    "PairedMetrics",
    "PseudoPairs",
    "Refinement",
    "anchor_kernel",
    "fit_mini_vec2vec",
    "frame",
    "match_clusters",
    "paired_metrics",
    "pseudo_targets",
    "refine_by_clusters",
    "refine_by_neighbours",
    "relative_similarity",
]

KMEANS_ITERATIONS = 20
KMEANS_STARTS = 5
SEEDING_ROWS = 2000


class MiniVec2Vec(NamedTuple):
    """The map and the frame it lives in, to which the means belong: new rows must go through the same frame.

    `matrix` is orthogonal only where asked for. `confidence` holds:

    - `matching_mean`, `matching_std`, `matching_min`, `matching_max`: over the runs, the cosine of the two matched
      cluster kernels, at most 1; a wide spread or a low mean says that the clusters have no common geometry.
    - `neighbour_similarity`: mean cosine of the relative representations of pseudo-pairs in stage 2.
    - `split_agreement`: mean cosine of rows mapped by the first half of the runs and by the second (with 2 runs or
      more); near 1 where they agree, near 0 where each half has found something else.
    - `mapped_similarity`: mean cosine of mapped rows to their nearest neighbours on the other side, at the end.
    - `singular_value_min`, `singular_value_max`: of `matrix`; 1 for an orthogonal map.
    """

    mean_a: Float[Tensor, " d_a"]
    mean_b: Float[Tensor, " d_b"]
    matrix: Float[Tensor, "d_a d_b"]
    confidence: dict[str, float]

    def map_a(self, rows: Float[Tensor, "n d_a"]) -> Float[Tensor, "n d_b"]:
        """New rows of the first space as unit rows of the second's frame."""
        return normalize(normalize(rows - self.mean_a, dim=1) @ self.matrix, dim=1)

    def frame_b(self, rows: Float[Tensor, "n d_b"]) -> Float[Tensor, "n d_b"]:
        """New rows of the second space as unit rows of its frame, to compare with `map_a`."""
        return normalize(rows - self.mean_b, dim=1)


class PseudoPairs(NamedTuple):
    """Per row of x: the mean of the rows of y taken for it, which they are, and how similar each was."""

    targets: Float[Tensor, "n_x d_y"]
    neighbours: Int[Tensor, "n_x k"]
    similarity: Float[Tensor, "n_x k"]


class Refinement(NamedTuple):
    """One step: the averaged map, the Procrustes solution that went into it, and what that was fitted to."""

    matrix: Float[Tensor, "d_a d_b"]
    step: Float[Tensor, "d_a d_b"]
    targets: Float[Tensor, "n d_b"]


class PairedMetrics(NamedTuple):
    """Retrieval of each mapped row's own target by cosine.

    `mean_cosine` of true pairs; `top1` share found first; `mean_rank`, 1 best; `foscttm`, the mean fraction of other
    targets closer than the true match, 0 perfect and 0.5 chance.
    """

    mean_cosine: float
    top1: float
    mean_rank: float
    foscttm: float


def fit_mini_vec2vec(
    a: Float[Tensor, "n_a d_a"],
    b: Float[Tensor, "n_b d_b"],
    *,
    runs: int = 30,
    clusters: int = 20,
    restarts: int = 30,
    rows_per_run: int = 10_000,
    neighbours: int = 50,
    refine_steps: int = 100,
    refine_sample: int = 1000,
    refine_neighbours: int = 50,
    refine_clusters: int = 500,
    alpha: float = 0.5,
    orthogonal: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> MiniVec2Vec:
    """Map embeddings of one encoder into the space of another from unpaired rows over the same distribution of items.

    The released notebook's settings are the defaults. Needs cluster structure that both encoders share: `clusters`
    far from the number of modes fails, and a cloud without modes gives chance. Equal seeds give equal results on one
    machine and set of libraries.

    Args:
        a: rows of the first encoder.
        b: rows of the second, of other items of the same kind.
        runs: S, clusterings whose matched centres become anchors; wrong ones are outvoted.
        clusters: c of each run.
        restarts: of the cluster matching; one start rarely finds the optimum.
        rows_per_run: rows drawn for each clustering, all where there are fewer.
        neighbours: k, rows of b averaged to a pseudo-target; half of b where that is fewer.
        refine_steps: T, steps by neighbours; 0 leaves stage 3 out.
        refine_sample: rows of a in such a step, all where there are fewer; the paper takes 10,000 (UNVERIFIED).
        refine_neighbours: k' of such a step, likewise.
        refine_clusters: c' of the one step by clusters, half of the smaller side where that is fewer; 0 leaves stage 4
            out.
        alpha: weight of each new solution in (0, 1].
        orthogonal: end with the nearest (semi-)orthogonal matrix.
        seed: of every draw.
        progress: show a bar on standard error.

    Raises:
        InputError: a setting is out of range, a row is not finite, or there are too few rows for the counts.
    """
    positive = {"runs": runs, "restarts": restarts, "refine_sample": refine_sample}
    positive |= {"neighbours": neighbours, "refine_neighbours": refine_neighbours}
    optional = {"refine_steps": refine_steps, "refine_clusters": refine_clusters}
    _check_fit(a, b, clusters, rows_per_run, alpha, positive, optional)
    neighbours, refine_neighbours = (min(count, len(b) // 2) for count in (neighbours, refine_neighbours))
    refine_clusters = min(refine_clusters, len(a) // 2, len(b) // 2)
    (x, mean_a), (y, mean_b) = frame(a), frame(b.to(a))
    streams = np.random.SeedSequence(seed).spawn(runs + 2)
    refining, comparing = (np.random.default_rng(stream) for stream in streams[:2])
    confidence: dict[str, float] = {}
    with progress_bar("aligning without pairs", runs + refine_steps + 2, unit="steps", enabled=progress) as advance:
        anchors_x, anchors_y, agreements = [], [], []
        for stream in streams[2:]:
            centres_x, centres_y, agreement = _anchors(x, y, clusters, restarts, rows_per_run, stream)
            anchors_x.append(centres_x)
            anchors_y.append(centres_y)
            agreements.append(agreement)
            advance()
        confidence |= {f"matching_{of}": float(getattr(np, of)(agreements)) for of in ("mean", "std", "min", "max")}
        pairs = pseudo_targets(x, y, torch.cat(anchors_x), torch.cat(anchors_y), neighbours)
        matrix = procrustes(x, pairs.targets)
        confidence["neighbour_similarity"] = float(pairs.similarity.mean())
        if runs > 1:
            sample = _draw(x, refine_sample, comparing)
            confidence["split_agreement"] = _split_agreement(sample, y, anchors_x, anchors_y, neighbours)
        advance()
        for _ in range(refine_steps):
            sample = _draw(x, refine_sample, refining)
            matrix = refine_by_neighbours(sample, y, matrix, refine_neighbours, alpha).matrix
            advance()
        if refine_clusters:
            centres_x = _clustered(x, refine_clusters, refining, 1)
            matrix = refine_by_clusters(centres_x, _settled(y, centres_x @ matrix), matrix, alpha).matrix
        advance()
    if orthogonal:
        matrix = _nearest_orthogonal(matrix)
    nearest = _nearest(normalize(_draw(x, refine_sample, comparing) @ matrix, dim=1), y, refine_neighbours)
    confidence["mapped_similarity"] = float(nearest.similarity.mean())
    singular = torch.linalg.svdvals(matrix)
    confidence |= {"singular_value_min": float(singular[-1]), "singular_value_max": float(singular[0])}
    return MiniVec2Vec(mean_a, mean_b, matrix, confidence)


def frame(rows: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "n d"], Float[Tensor, " d"]]:
    """Rows around their mean as unit rows, and the mean, which belongs to the model."""
    mean = rows.mean(0)
    return normalize(rows - mean, dim=1), mean


def anchor_kernel(centres: Float[Tensor, "c d"]) -> Float[Tensor, "c c"]:
    """H C C^T H with H = I - 11^T/c: inner products of the centres around their own mean."""
    centred = centres - centres.mean(0)
    return centred @ centred.T


def match_clusters(
    kernel_a: Float[Tensor, "c c"], kernel_b: Float[Tensor, "c c"], *, restarts: int = 30, seed: int = 0
) -> tuple[Int[Tensor, " c"], float]:
    """The permutation found to maximise sum_ij K_a[i, j] K_b[perm[i], perm[j]], and that sum.

    Pairwise exchange (2-opt) from `restarts` random starts, the best kept; the optimum is likely, not certain: one
    start finds it in 10 to 70 % of cases at c = 8.

    Raises:
        InputError: the kernels are not square and alike, or restarts is below 1.
    """
    at_least("restarts", restarts)
    if kernel_a.ndim != 2 or kernel_a.shape != kernel_b.shape or kernel_a.shape[0] != kernel_a.shape[1]:
        shapes = f"{tuple(kernel_a.shape)} and {tuple(kernel_b.shape)}"
        raise InputError(f"the kernels have shapes {shapes}; give two square ones of as many clusters")
    left, right = (kernel.detach().cpu().double().numpy() for kernel in (kernel_a, kernel_b))
    rng = np.random.default_rng(seed)
    options = {"maximize": True, "rng": rng}
    found = [quadratic_assignment(left, right, method="2opt", options=options) for _ in range(restarts)]
    best = max(found, key=lambda result: result.fun)
    return torch.as_tensor(best.col_ind, dtype=torch.int64, device=kernel_a.device), float(best.fun)


def relative_similarity(
    x: Float[Tensor, "n_x d_x"],
    y: Float[Tensor, "n_y d_y"],
    anchors_x: Float[Tensor, "s d_x"],
    anchors_y: Float[Tensor, "s d_y"],
) -> Float[Tensor, "n_x n_y"]:
    """Cosines of the relative representations cos(x, anchors_x) and cos(y, anchors_y); anchor i matches anchor i."""
    return _relative(x, anchors_x) @ _relative(y, anchors_y).T


def pseudo_targets(
    x: Float[Tensor, "n_x d_x"],
    y: Float[Tensor, "n_y d_y"],
    anchors_x: Float[Tensor, "s d_x"],
    anchors_y: Float[Tensor, "s d_y"],
    k: int,
    *,
    block: int = 1024,
) -> PseudoPairs:
    """For each row of x the plain mean of the k rows of y of the largest `relative_similarity`.

    The n_x x n_y similarities are formed `block` rows at a time. k is at most n_y.
    """
    return _nearest(_relative(x, anchors_x), _relative(y, anchors_y), k, values=y, block=block)


def refine_by_neighbours(
    sample: Float[Tensor, "n d_a"],
    y: Float[Tensor, "n_b d_b"],
    matrix: Float[Tensor, "d_a d_b"],
    k: int,
    alpha: float = 0.5,
) -> Refinement:
    """One Refine-1 step: each sampled row's target is the mean of the k rows of y nearest to `sample @ matrix`."""
    unit = normalize(y, dim=1)
    targets = _nearest(normalize(sample @ matrix, dim=1), unit, k, values=y).targets
    return _averaged(sample, targets, matrix, alpha)


def refine_by_clusters(
    centres_a: Float[Tensor, "c d_a"],
    centres_b: Float[Tensor, "c d_b"],
    matrix: Float[Tensor, "d_a d_b"],
    alpha: float = 0.5,
) -> Refinement:
    """One Refine-2 step: centre i of one side is the target of centre i of the other.

    `centres_b` come from k-means started at `centres_a @ matrix`, which gives them that order.
    """
    return _averaged(centres_a, centres_b, matrix, alpha)


def paired_metrics(mapped: Float[Tensor, "n d"], target: Float[Tensor, "n d"], *, block: int = 1024) -> PairedMetrics:
    """How well each mapped row finds its own target among all targets; ranks count the targets strictly closer.

    Raises:
        InputError: the rows cannot be paired or differ in width.
    """
    check_pairs(mapped, target)
    if mapped.shape[1] != target.shape[1]:
        raise InputError(f"mapped has width {mapped.shape[1]}, target {target.shape[1]}; give rows of one space")
    left, right = normalize(mapped, dim=1), normalize(target, dim=1)
    cosines, ranks = [], []
    for start in range(0, len(left), block):
        similarity = left[start : start + block] @ right.T
        own = similarity.diagonal(start).unsqueeze(1)
        cosines.append(own.squeeze(1))
        ranks.append(1 + (similarity > own).sum(1))
    rank, cosine = torch.cat(ranks).cpu().double(), torch.cat(cosines).cpu().double()
    mean_rank = float(rank.mean())
    return PairedMetrics(
        float(cosine.mean()), float((rank == 1).double().mean()), mean_rank, (mean_rank - 1) / (len(left) - 1)
    )


def _anchors(
    x: Float[Tensor, "n_a d_a"],
    y: Float[Tensor, "n_b d_b"],
    clusters: int,
    restarts: int,
    rows_per_run: int,
    stream: np.random.SeedSequence,
) -> tuple[Float[Tensor, "c d_a"], Float[Tensor, "c d_b"], float]:
    """One run of stage 1: matched centres, and the cosine of their kernels."""
    rng = np.random.default_rng(stream)
    centres_x, centres_y = (_clustered(_draw(rows, rows_per_run, rng), clusters, rng, KMEANS_STARTS) for rows in (x, y))
    kernel_x, kernel_y = anchor_kernel(centres_x), anchor_kernel(centres_y)
    order, objective = match_clusters(kernel_x, kernel_y, restarts=restarts, seed=int(rng.integers(2**32)))
    return centres_x, centres_y[order], objective / float(kernel_x.norm() * kernel_y.norm())


def _clustered(rows: Float[Tensor, "n d"], count: int, rng: np.random.Generator, starts: int) -> Float[Tensor, "c d"]:
    """Centres of k-means from the tightest of several starts: a mode missed on one side spoils the matching."""
    few = _draw(rows, max(SEEDING_ROWS, 4 * count), rng)
    seeds, _ = min((_seeds(few, count, rng) for _ in range(starts)), key=lambda found: found[1])
    return _settled(rows, seeds)


def _settled(rows: Float[Tensor, "n d"], start: Float[Tensor, "c d"]) -> Float[Tensor, "c d"]:
    """Centres of k-means from given ones, whose order they keep."""
    with warnings.catch_warnings():
        # An empty cluster keeps its centre, which is as good an anchor as a wrong one: it is outvoted.
        warnings.filterwarnings("ignore", message="One of the clusters is empty")
        arrays = (given.detach().cpu().numpy() for given in (rows, start))
        centres, _ = kmeans2(*arrays, iter=KMEANS_ITERATIONS, minit="matrix")
    return torch.from_numpy(centres).to(rows)


def _seeds(rows: Float[Tensor, "n d"], count: int, rng: np.random.Generator) -> tuple[Float[Tensor, "c d"], float]:
    """Greedy k-means++ and the squared distance it leaves: each next row is the best of a few drawn by that distance.

    (Arthur & Vassilvitskii 2007.) scipy draws one, which misses modes in nearly every start at 20 clusters.
    """
    trials = 2 + int(math.log(count))
    chosen = [int(rng.integers(len(rows)))]
    distance = torch.cdist(rows, rows[chosen]).square().squeeze(1)
    while len(chosen) < count:
        mass = distance.double().cumsum(0)
        drawn = torch.searchsorted(mass, torch.from_numpy(rng.random(trials)).to(mass) * mass[-1])
        candidates = drawn.clamp(max=len(rows) - 1)
        left = torch.minimum(distance.unsqueeze(1), torch.cdist(rows, rows[candidates]).square())
        best = int(left.sum(0).argmin())
        chosen.append(int(candidates[best]))
        distance = left[:, best]
    return rows[chosen], float(distance.sum())


def _draw(rows: Float[Tensor, "n d"], count: int, rng: np.random.Generator) -> Float[Tensor, "count d"]:
    """Distinct rows at random; all of them where there are no more."""
    if count >= len(rows):
        return rows
    return rows[torch.from_numpy(rng.choice(len(rows), count, replace=False)).to(rows.device)]


def _relative(rows: Float[Tensor, "n d"], anchors: Float[Tensor, "s d"]) -> Float[Tensor, "n s"]:
    return normalize(normalize(rows, dim=1) @ normalize(anchors, dim=1).T, dim=1)


def _nearest(
    queries: Float[Tensor, "n d"],
    gallery: Float[Tensor, "m d"],
    k: int,
    *,
    values: Float[Tensor, "m d_v"] | None = None,
    block: int = 1024,
) -> PseudoPairs:
    """The k unit rows of `gallery` nearest to each unit query, and the mean of their `values` (or of themselves)."""
    source = gallery if values is None else values
    found = []
    for part in queries.split(block):
        similarity, index = (part @ gallery.T).topk(k, dim=1)
        found.append((source[index].mean(1), index, similarity))
    return PseudoPairs(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _averaged(source: Tensor, targets: Tensor, matrix: Tensor, alpha: float) -> Refinement:
    step = procrustes(source, targets)
    return Refinement((1 - alpha) * matrix + alpha * step, step, targets)


def _split_agreement(
    sample: Float[Tensor, "n d_a"],
    y: Float[Tensor, "n_b d_b"],
    anchors_x: Sequence[Float[Tensor, "c d_a"]],
    anchors_y: Sequence[Float[Tensor, "c d_b"]],
    k: int,
) -> float:
    half = len(anchors_x) // 2
    mapped = []
    for part in (slice(half), slice(half, None)):
        pairs = pseudo_targets(sample, y, torch.cat(list(anchors_x[part])), torch.cat(list(anchors_y[part])), k)
        mapped.append(normalize(sample @ procrustes(sample, pairs.targets), dim=1))
    return float((mapped[0] * mapped[1]).sum(1).mean())


def _nearest_orthogonal(matrix: Float[Tensor, "d_a d_b"]) -> Float[Tensor, "d_a d_b"]:
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vh


def _check_fit(
    a: Tensor,
    b: Tensor,
    clusters: int,
    rows_per_run: int,
    alpha: float,
    positive: dict[str, int],
    optional: dict[str, int],
) -> None:
    for name, value in positive.items():
        at_least(name, value)
    for name, value in optional.items():
        at_least(name, value, 0)
    at_least("clusters", clusters, 2)
    at_least("rows_per_run", rows_per_run, 2 * clusters)
    in_range("alpha", alpha, 0, 1)
    if not alpha:
        raise InputError("alpha is 0, with which no step changes the map; give a number above 0")
    for name, rows in (("a", a), ("b", b)):
        check_rows(name, rows)
        if len(rows) < 2 * clusters:
            raise InputError(
                f"clusters is {clusters}, and {name} has {len(rows)} rows; give two rows a cluster or more"
            )
