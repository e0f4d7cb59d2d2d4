"""The mathematics of BranchGRPO (arXiv 2509.06040): rollouts of a prompt that share their beginnings, as a tree.

A node is a latent, the root the first noise; the edge into a node is the denoising step that led there and carries the
node's advantage. Nodes are numbered root first, breadth first, and all that is said of nodes is in this order.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmalign.checks import at_least, one_of
from mmalign.errors import InputError

__all__ = ["BranchTree", "WidthPruning", "branch_noise", "depth_advantages", "fuse_rewards", "grow_tree", "keep_edges"]

WidthPruning = Literal["none", "best", "extremes"]


@dataclass(frozen=True, eq=False)
class BranchTree:
    """The nodes of a tree.

    Attributes:
        parent: number of the node that each came from; -1 for the root.
        depth: steps from the root; the edge into a node is step `depth - 1` of the sampler.
    """

    parent: Int[Tensor, " nodes"]
    depth: Int[Tensor, " nodes"]

    @cached_property
    def leaves(self) -> Int[Tensor, " leaves"]:
        """Numbers of the nodes without children: the images."""
        inner = torch.zeros_like(self.parent, dtype=torch.bool)
        inner[self.parent[1:]] = True
        return (~inner).nonzero()[:, 0]

    @property
    def denoiser_calls(self) -> int:
        """How often the network is asked: once for each node that is not a leaf, whatever number of children it has."""
        return len(self.parent) - len(self.leaves)


def grow_tree(steps: int, split_steps: Sequence[int], branching: int = 2) -> BranchTree:
    """The tree of a rollout of `steps`, in which each node gets `branching` children at `split_steps`, one elsewhere.

    The published tree has 20 steps, splits 0, 3, 6 and 9, and so 16 leaves.

    Raises:
        InputError: fewer than two branches, no step, or a split at a step that is not there.
    """
    at_least("steps", steps)
    at_least("branching", branching, 2)
    if beyond := [step for step in split_steps if not 0 <= step < steps]:
        raise InputError(f"split step {beyond[0]} is not one of {steps} steps; give numbers from 0 to {steps - 1}")
    parent, depth, last = [-1], [0], [0]
    for step in range(steps):
        born = [node for node in last for _ in range(branching if step in split_steps else 1)]
        last = list(range(len(parent), len(parent) + len(born)))
        parent += born
        depth += [step + 1] * len(born)
    return BranchTree(torch.tensor(parent), torch.tensor(depth))


def branch_noise(shared: Float[Tensor, "n ..."], own: Float[Tensor, "n ..."], scale: float) -> Float[Tensor, "n ..."]:
    """(shared + scale * own) / sqrt(1 + scale^2): the noise of one of the children of a split.

    Standard normal where both are, so a child's density is that of any other step; siblings, which have `shared` in
    common, are correlated by 1 / (1 + scale^2). The released code multiplies independent noise by `scale` instead,
    4, so that children are 4 times as noisy as their own density says; the paper's form is this one, with scale 4.
    """
    return (shared + scale * own) / math.sqrt(1 + scale**2)


def fuse_rewards(
    tree: BranchTree,
    leaf_rewards: Float[Tensor, " leaves"],
    edge_log_probs: Float[Tensor, " nodes"] | None = None,
    *,
    beta: float = 0.0,
) -> Float[Tensor, " nodes"]:
    """The reward of every node: a weighted mean of those of the leaves below it.

    Weights are a softmax over the leaves of beta times the log-density of the path from the node to the leaf, as in the
    paper (beta 1); all alike at 0. The released code takes a softmax over the children of a node instead, of the
    single edge to each, and goes on from their fused rewards, which is another number below two splits.

    Args:
        tree: of the rollout.
        leaf_rewards: in the order of `tree.leaves`.
        edge_log_probs: of the edge into each node, as a mean over the latents; that of the root does not count.
        beta: 0 or more.

    Raises:
        InputError: a beta without log-densities.
    """
    if beta and edge_log_probs is None:
        raise InputError(f"beta is {beta:g} without edge_log_probs; give those of the rollout, or beta 0")
    parent = tree.parent.tolist()
    edges = [0.0] * len(parent) if edge_log_probs is None else edge_log_probs.tolist()
    paths = torch.full((len(parent), len(tree.leaves)), -math.inf, dtype=torch.float64)
    for number, leaf in enumerate(tree.leaves.tolist()):
        node, path = leaf, 0.0
        while node >= 0:
            paths[node, number] = beta * path
            path += edges[node]
            node = parent[node]
    fused = paths.softmax(1) @ leaf_rewards.to("cpu", torch.float64)
    return fused.to(leaf_rewards.device, torch.promote_types(leaf_rewards.dtype, torch.float32))


def depth_advantages(tree: BranchTree, node_rewards: Float[Tensor, " nodes"]) -> Float[Tensor, " nodes"]:
    """Of the edge into each node: (r - mean of its depth) / (std of its depth + 1e-8), before any clamp.

    The deviation is the sample's; 0 where it is below 1e-6 and at depths of one node, so at the root.
    """
    rewards = node_rewards.to("cpu", torch.float64)
    depth = tree.depth.to("cpu")
    advantages = torch.zeros_like(rewards)
    for level in depth.unique():
        own = rewards[depth == level]
        if len(own) > 1 and (std := own.std()) >= 1e-6:
            advantages[depth == level] = (own - own.mean()) / (std + 1e-8)
    return advantages.to(node_rewards.device, torch.promote_types(node_rewards.dtype, torch.float32))


def keep_edges(
    tree: BranchTree,
    advantages: Float[Tensor, " nodes"],
    *,
    pruned_depths: Collection[int] = (),
    width: WidthPruning = "none",
    ratio: float = 0.5,
    split_steps: Sequence[int],
) -> Bool[Tensor, " nodes"]:
    """Which edges are trained, named by the nodes that they lead to. The root, to which none leads, is False.

    Pruning saves passes with gradient alone; the rollout and the rewards stay. Pruned depths go first; width pruning
    then chooses among the edges that are left after the last split, and those before it stay.

    Args:
        tree: of the rollout.
        advantages: of the edges, see `depth_advantages`.
        pruned_depths: depths of nodes whose edges go (the paper: four depths in a row, moved on every 30 iterations).
        width: "best" keeps of each branch after the last split the `ratio` of its edges with the highest advantages,
            the earlier of equal ones, and one at least; "extremes" keeps half of `ratio` of all these edges at each
            end, two at least.
        ratio: share of edges that width pruning keeps.
        split_steps: of `grow_tree`.

    Raises:
        InputError: another width.
    """
    one_of("width", width, get_args(WidthPruning))
    parent, depth = tree.parent.tolist(), tree.depth.tolist()
    keep = [node > 0 and depth[node] not in pruned_depths for node in range(len(parent))]
    after = max(split_steps, default=-1) + 1  # depth at which the last branches begin
    candidates = [node for node in range(len(parent)) if keep[node] and depth[node] > after]
    if width == "none" or not candidates:
        return torch.tensor(keep, device=tree.parent.device)
    values = advantages.tolist()
    candidates.sort(key=lambda node: -values[node])  # the order of equal ones stays
    if width == "extremes":
        kept = max(2, math.floor(ratio * len(candidates)))
        best = kept // 2
        chosen = {*candidates[:best], *candidates[len(candidates) - (kept - best) :]}
    else:
        branches: dict[int, list[int]] = {}
        for node in candidates:
            start = node
            while depth[start] > after:
                start = parent[start]
            branches.setdefault(start, []).append(node)
        chosen = {node for own in branches.values() for node in own[: max(1, math.floor(ratio * len(own)))]}
    for node in candidates:
        keep[node] = node in chosen
    return torch.tensor(keep, device=tree.parent.device)
