"""Rollouts of a policy: an unmodified pipeline whose steps add noise of a known density, kept to be taken again.

What is drawn and what is trained go through the same pipeline, in the same batches: the ratio of both densities is 1
exactly, until the weights change.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .objectives.branch_tree import BranchTree, branch_noise
from .pipelines import denoiser_of
from .steering import DenoiserStep, run_steered
from .stochastic_steps import StochasticStep, constant_free_log_prob, gaussian_log_prob, take_step

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["GradedStep", "Policy", "Rollout"]


@dataclass(eq=False)
class GradedStep:
    """One forward pass of a rollout with the transitions that followed it, to be passed again with gradient.

    Attributes:
        number: of the step.
        roots: the image or tree that each row belongs to.
        latents: what the network saw.
        mean: of each row's transition, by the weights that drew.
        parents: the row that each transition starts from; several do where a tree splits.
        samples: what each came to, in the precision that the next step saw.
        log_prob: of each, by the weights that drew.
        nodes: number of each in its tree.
    """

    number: int
    roots: list[int]
    latents: Float[Tensor, "n ..."]
    mean: Float[Tensor, "n ..."]
    parents: Int[Tensor, " e"]
    samples: Float[Tensor, "e ..."]
    log_prob: Float[Tensor, " e"]
    nodes: list[int]

    @property
    def edges(self) -> list[tuple[int, int]]:
        """Root and node of each transition."""
        return [(self.roots[row], node) for row, node in zip(self.parents.tolist(), self.nodes, strict=True)]


@dataclass(eq=False)
class Rollout:
    """What was drawn.

    Attributes:
        latents: of the finished images: all leaves of the first tree, then those of the next.
        steps: what is kept to be trained on, in the order in which it was drawn.
        denoiser_calls: rows that went through the network, guidance not counted.
    """

    latents: Float[Tensor, "n ..."]
    steps: list[GradedStep]
    denoiser_calls: int


@dataclass(frozen=True)
class Policy:
    """How a pipeline draws with noise.

    Attributes:
        pipeline: its scheduler says the noise levels, and takes no step itself.
        steps: makes the coefficients of each step, once the scheduler knows its timesteps.
        noise: standard normal noise of a transition from its root and node, in the shape that is asked for.
        tree: where images split; a tree of one leaf for independent images.
        branch_scale: how much of siblings' noise is their own, see `branch_noise`.
        constant_free: log-probabilities as CPS gives them, without what does not depend on the network.
    """

    pipeline: DiffusionPipeline
    steps: Callable[[Any], Sequence[StochasticStep]]
    noise: Callable[[int, int, Sequence[int]], Float[Tensor, ...]]
    tree: BranchTree
    branch_scale: float = 4.0
    constant_free: bool = False

    def log_prob(
        self, samples: Float[Tensor, "n ..."], mean: Float[Tensor, "n ..."], step: StochasticStep
    ) -> Float[Tensor, " n"]:
        """Of transitions, as means over their entries."""
        if self.constant_free:
            return constant_free_log_prob(samples, mean)
        return gaussian_log_prob(samples, mean, step.std)

    @torch.no_grad()
    def draw(
        self, call: Callable[[Sequence[int]], Mapping[str, Any]], roots: int, *, size: int, kept: Collection[int]
    ) -> Rollout:
        """Draw the images of `roots` trees.

        Args:
            call: the pipeline's arguments for rows of the given roots, with a generator each, of the initial noise.
            roots: how many.
            size: rows that go through the network at once, at most.
            kept: numbers of the steps that are to be trained on.
        """
        rows = [(root, 0) for root in range(roots)]
        latents: Tensor | None = None
        number, total, calls = 0, int(self.tree.depth.max()), 0
        steps: list[GradedStep] = []
        children = _children(self.tree)
        while number < total:
            end = number + 1
            while len(children[rows[0][1]]) == 1 and end < total and end not in self._splits:
                end += 1
            found: list[Tensor] = []
            after: list[tuple[int, int]] = []
            for start in range(0, len(rows), size):
                walk = _Walk(self, rows[start : start + size], children, kept)
                run_steered(
                    self.pipeline,
                    call([root for root, _ in walk.rows]),
                    first=number,
                    end=end if end < total else None,
                    latents=None if latents is None else latents[start : start + size],
                    advance=walk.advance,
                )
                steps += walk.kept
                calls += walk.calls
                found.append(walk.samples)
                after += walk.rows
            rows, latents, number = after, torch.cat(found), end
        assert latents is not None
        order = sorted(range(len(rows)), key=lambda row: rows[row])
        return Rollout(latents[order], steps, calls)

    def mean(
        self,
        call: Mapping[str, Any],
        graded: GradedStep,
        reference: Callable[[], AbstractContextManager[nn.Module]] | None = None,
    ) -> tuple[Float[Tensor, "n ..."], StochasticStep]:
        """The means of a step that was drawn, by the weights as they are, with gradient; and its coefficients.

        Args:
            call: the pipeline's arguments for the rows of the step.
            graded: the step.
            reference: the network to ask instead, without gradient; see `Trainer.reference`.
        """
        found: list[tuple[Tensor, StochasticStep]] = []

        def advance(step: DenoiserStep) -> Tensor:
            coefficients = self.steps(self.pipeline.scheduler)[step.number]
            found.append((coefficients.mean(step.sample, step.prediction), coefficients))
            return step.sample

        def run(denoise: Any = None) -> None:
            run_steered(
                self.pipeline,
                call,
                first=graded.number,
                end=graded.number + 1,
                latents=graded.latents,
                denoise=denoise,
                advance=advance,
            )

        if reference is None:
            with torch.enable_grad():
                run()
        else:
            own = denoiser_of(self.pipeline)[1]
            with reference() as network, torch.no_grad():
                # the network itself, adapters off, would come back to where we are
                run(None if network is own else lambda _, __, args, kwargs: network(*args, **kwargs))
        return found[0]

    @property
    def _splits(self) -> set[int]:
        children = _children(self.tree)
        return {int(self.tree.depth[node]) for node, below in enumerate(children) if len(below) > 1}


@dataclass
class _Walk:
    """Steps of some rows, which at a split become more."""

    policy: Policy
    rows: list[tuple[int, int]]
    children: list[list[int]]
    wanted: Collection[int]
    kept: list[GradedStep] = field(default_factory=list)
    calls: int = 0
    samples: Tensor = field(default_factory=lambda: torch.empty(0))

    def advance(self, step: DenoiserStep) -> Tensor:
        policy, rows = self.policy, self.rows
        self.calls += len(rows)
        coefficients = policy.steps(policy.pipeline.scheduler)[step.number]
        below = [self.children[node] for _, node in rows]
        count = len(below[0])
        edges = [(root, child) for (root, _), nodes in zip(rows, below, strict=True) for child in nodes]
        shape = step.sample.shape[1:]

        def drawn(of: Sequence[tuple[int, int]]) -> Tensor:
            return torch.stack([policy.noise(root, node, shape) for root, node in of]).to(step.sample.device)

        parents = torch.arange(len(rows), device=step.sample.device).repeat_interleave(count)
        if coefficients.std == 0:
            samples = coefficients.mean(step.sample, step.prediction).to(step.sample.dtype)
        else:
            noise = drawn(edges)
            if count > 1:
                # that of the parent's own transition is used up: node numbers below 0 name what siblings share
                shared = drawn([(root, -1 - node) for root, node in rows])
                noise = branch_noise(shared[parents], noise, policy.branch_scale)
            taken = take_step(coefficients, step.sample[parents], step.prediction[parents], noise)
            samples = taken.sample.to(step.sample.dtype)  # rounded first: the density is that of what goes on
            if step.number in self.wanted:
                log_prob = policy.log_prob(samples, taken.mean, coefficients)
                roots, nodes = [root for root, _ in rows], [node for _, node in edges]
                self.kept.append(
                    GradedStep(step.number, roots, step.sample, taken.mean[::count], parents, samples, log_prob, nodes)
                )
        self.rows, self.samples = edges, samples
        return samples[::count]


def _children(tree: BranchTree) -> list[list[int]]:
    below: list[list[int]] = [[] for _ in range(len(tree.parent))]
    for node, parent in enumerate(tree.parent.tolist()):
        if parent >= 0:
            below[parent].append(node)
    return below
