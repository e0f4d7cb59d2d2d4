"""BranchGRPO's trees: their shape, the noise of their children, what their leaves' rewards become of their edges."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
import torch

from generation.objectives.branch_tree import (
    BranchTree,
    branch_noise,
    depth_advantages,
    fuse_rewards,
    grow_tree,
    keep_edges,
)
from generation.stochastic_steps import dance_sde_step, take_step
from mmalign.errors import InputError

PUBLISHED = (20, (0, 3, 6, 9))


def children(tree: BranchTree, node: int) -> list[int]:
    return [child for child, parent in enumerate(tree.parent.tolist()) if parent == node]


def leaves_below(tree: BranchTree, node: int) -> list[int]:
    below = children(tree, node)
    return [leaf for child in below for leaf in leaves_below(tree, child)] if below else [node]


def test_the_published_tree_costs_203_passes_for_16_images() -> None:
    tree = grow_tree(*PUBLISHED)
    assert (len(tree.parent), len(tree.leaves), tree.denoiser_calls) == (219, 16, 203)
    assert tree.depth[tree.leaves].tolist() == [20] * 16


@pytest.mark.parametrize(
    ("steps", "splits", "branching"), [(4, (1, 3), 3), (3, (), 2), (1, (0,), 4), (5, (0, 1, 4), 2)]
)
def test_nodes_are_numbered_breadth_first_and_split_where_asked(
    steps: int, splits: tuple[int, ...], branching: int
) -> None:
    tree = grow_tree(steps, splits, branching)
    parent, depth = tree.parent.tolist(), tree.depth.tolist()
    assert (parent[0], depth[0]) == (-1, 0)
    assert parent == sorted(parent)
    assert depth == sorted(depth)
    for node, level in enumerate(depth):
        born = children(tree, node)
        assert len(born) == (0 if level == steps else branching if level in splits else 1)
        assert all(depth[child] == level + 1 for child in born)
    assert tree.leaves.tolist() == [node for node in range(len(parent)) if not children(tree, node)]
    assert len(tree.leaves) == branching ** len(splits)


@pytest.mark.parametrize("scale", [0.0, 0.5, 4.0])
def test_every_child_has_the_density_of_its_step_and_siblings_are_alike_by_the_scale(scale: float) -> None:
    n = 40_000
    step = dance_sde_step(0.7, 0.6, level=0.9)
    generator = torch.Generator().manual_seed(0)
    shared, *own = (torch.randn(n, 1, generator=generator) for _ in range(3))
    x, output = torch.full((n, 1), 0.4), torch.full((n, 1), -1.1)
    born = [take_step(step, x, output, branch_noise(shared, noise, scale)) for noise in own]
    for child in born:
        assert float(child.sample.mean()) == pytest.approx(float(child.mean[0, 0]), abs=5 * step.std / math.sqrt(n))
        assert float(child.sample.std()) == pytest.approx(step.std, rel=5 / math.sqrt(2 * n))
    correlation = torch.corrcoef(torch.cat([child.sample for child in born], 1).T)[0, 1]
    assert float(correlation) == pytest.approx(1 / (1 + scale**2), abs=0.02)


def path_from(tree: BranchTree, node: int, leaf: int, edges: list[float]) -> float:
    return 0.0 if node == leaf else edges[leaf] + path_from(tree, node, int(tree.parent[leaf]), edges)


@pytest.mark.parametrize("beta", [0.0, 1.0, 3.0])
def test_rewards_are_fused_over_the_leaves_below(beta: float) -> None:
    generator = torch.Generator().manual_seed(1)
    tree = grow_tree(6, (0, 2, 3), 2)
    edges = torch.randn(len(tree.parent), generator=generator, dtype=torch.float64)
    rewards = torch.randn(len(tree.leaves), generator=generator, dtype=torch.float64)
    found = fuse_rewards(tree, rewards, edges, beta=beta)
    of_leaf = dict(zip(tree.leaves.tolist(), rewards.tolist(), strict=True))
    for node in range(len(tree.parent)):
        below = leaves_below(tree, node)
        weights = [math.exp(beta * path_from(tree, node, leaf, edges.tolist())) for leaf in below]
        wanted = sum(w * of_leaf[leaf] for w, leaf in zip(weights, below, strict=True)) / sum(weights)
        assert float(found[node]) == pytest.approx(wanted, rel=1e-10)
    assert torch.equal(found[tree.leaves], rewards)
    if beta == 0:
        torch.testing.assert_close(fuse_rewards(tree, rewards), found)


def test_long_paths_of_extreme_densities_stay_finite() -> None:
    tree = grow_tree(*PUBLISHED)
    rewards = torch.arange(16.0)
    fused = fuse_rewards(tree, rewards, torch.full((219,), 500.0), beta=1.0)
    torch.testing.assert_close(fused, fuse_rewards(tree, rewards))
    assert fused.dtype == torch.float32


def test_advantages_compare_nodes_of_one_depth() -> None:
    generator = torch.Generator().manual_seed(2)
    tree = grow_tree(5, (1, 3), 3)
    rewards = fuse_rewards(tree, torch.randn(9, generator=generator))
    found = depth_advantages(tree, rewards)
    for level in range(6):
        own = [node for node in range(len(tree.parent)) if int(tree.depth[node]) == level]
        values = [float(rewards[node]) for node in own]
        for node in own:
            wanted = 0.0
            if len(own) > 1:
                wanted = (float(rewards[node]) - statistics.mean(values)) / (statistics.stdev(values) + 1e-8)
            assert float(found[node]) == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    # After the last split a chain has one leaf, and one advantage exactly: what ties of pruning rest on.
    for leaf in tree.leaves.tolist():
        assert found[leaf] == found[int(tree.parent[leaf])]


def test_rewards_that_hardly_differ_give_no_advantage() -> None:
    tree = grow_tree(2, (0,), 2)
    for gap, none in ((1e-6, True), (2e-6, False)):  # the deviation of two is their gap over the root of 2
        found = depth_advantages(tree, fuse_rewards(tree, torch.tensor([1.0, 1.0 + gap], dtype=torch.float64)))
        assert (found == 0).all() == none


@pytest.mark.parametrize(("pruned", "ratio"), list(itertools.product([(), (1, 2), (4, 5)], [0.1, 0.2, 0.45, 0.8])))
def test_pruning_by_hand(pruned: tuple[int, ...], ratio: float) -> None:
    generator = torch.Generator().manual_seed(3)
    splits = (0, 2)
    tree = grow_tree(7, splits, 2)
    count = len(tree.parent)
    advantages = torch.randn(count, generator=generator)  # all different: the order of ties is the golden test's
    keep = {
        width: keep_edges(tree, advantages, pruned_depths=pruned, width=width, ratio=ratio, split_steps=splits)
        for width in ("none", "best", "extremes")
    }
    left = [node for node in range(1, count) if int(tree.depth[node]) not in pruned]
    assert keep["none"].nonzero()[:, 0].tolist() == left
    late = [node for node in left if int(tree.depth[node]) > 3]  # the last split's own edges lead to depth 3
    by_advantage = sorted(late, key=lambda node: float(advantages[node]))

    k = max(2, int(ratio * len(late)))
    ends = {*by_advantage[len(late) - k // 2 :], *by_advantage[: k - k // 2]}
    assert set(keep["extremes"].nonzero()[:, 0].tolist()) == (set(left) - set(late)) | ends

    best = set()
    for start in [node for node in range(count) if int(tree.depth[node]) == 3]:
        branch = [node for node in reversed(by_advantage) if leaves_below(tree, node) == leaves_below(tree, start)]
        best |= set(branch[: max(1, int(ratio * len(branch)))])
    assert set(keep["best"].nonzero()[:, 0].tolist()) == (set(left) - set(late)) | best


def test_nothing_is_left_to_prune_after_a_split_at_the_end() -> None:
    tree = grow_tree(3, (2,), 2)
    for width in ("best", "extremes"):
        kept = keep_edges(tree, torch.zeros(len(tree.parent)), width=width, split_steps=(2,))
        assert kept.tolist() == [False] + [True] * (len(tree.parent) - 1)


def test_what_cannot_be_meant_is_refused() -> None:
    with pytest.raises(InputError, match="split step 4 is not one of 4 steps; give numbers from 0 to 3"):
        grow_tree(4, (0, 4))
    with pytest.raises(InputError, match="branching is 1; give 2 or more"):
        grow_tree(4, (0,), 1)
    tree = grow_tree(2, (0,))
    with pytest.raises(InputError, match="beta is 1 without edge_log_probs"):
        fuse_rewards(tree, torch.zeros(2), beta=1.0)
    with pytest.raises(InputError, match="width is 'half'; give one of none, best, extremes"):
        keep_edges(tree, torch.zeros(5), width="half", split_steps=(0,))  # type: ignore[arg-type]
