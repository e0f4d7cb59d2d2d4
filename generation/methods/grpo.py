"""GRPO for image generators: policy optimisation on rewards that need no gradient, from composable parts.

Flow-GRPO (arXiv 2505.05470), GRPO-Guard (2510.22319), MC-GRPO (2601.22582), BranchGRPO (2509.06040), DanceGRPO
(2505.07818) and DDPO's sampler (2305.13301) are settings of one trainer: how noise is added (`generation.rollouts`,
`generation.stochastic_steps`), what a group's rewards become (`objectives.group_advantages`, `objectives.branch_tree`),
and what is made of the ratio of densities (`objectives.policy_gradient`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmalign.errors import InputError

from ..objectives.branch_tree import depth_advantages, fuse_rewards, grow_tree, keep_edges
from ..objectives.group_advantages import MAX_ADVANTAGE, group_advantages, median_advantages
from ..objectives.noise_windows import draw_noise_window
from ..objectives.policy_gradient import (
    gaussian_divergence,
    guarded_ratio,
    kl_masked_loss,
    plain_ratio,
    policy_loss,
    scaled_clip_range,
    step_weights,
)
from ..pipelines import pipeline_family
from ..rewards import WeightedSum
from ..rollouts import GradedStep, Policy, Rollout
from ..stochastic_steps import SamplerKind, StochasticStep, stochastic_steps
from ..training.adaptation import Adaptation, make_adaptation
from ..training.feed import TrainingData
from ..training.prompt_set import PromptBatch
from ..training.randomness import stream
from ..training.reward_training import RewardConfig, RewardTrainer
from .grpo_settings import GRPOConfig

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = ["GRPOTrainer"]

_NOISE_LEVELS = {"flow-sde": 0.7, "dance-sde": 0.3, "cps": 0.8, "ddim": 1.0}
_CLIP_RANGES = {"plain": 1e-4, "guard": 2e-6}
_LEAST_SPREAD = 0.1  # of the median's scale, as a share of the standard deviation: binary rewards have none


@dataclass(eq=False)
class _Item:
    """A forward pass to be trained on, with what each of its transitions is worth."""

    step: GradedStep
    batch: PromptBatch
    advantages: Float[Tensor, " e"]
    kept: Float[Tensor, " e"]  # 1, or 0 for what trains nothing
    share: float = 1.0

    def to(self, device: torch.device) -> _Item:
        return self

    def labels(self) -> dict[str, list[str]]:
        rows = [self.step.roots[row] for row in self.step.parents.tolist()]
        return {"": [f"{self.batch.prompts[row]!r} (image {self.batch.ordinals[row]})" for row in rows]}


class GRPOTrainer(RewardTrainer):
    """A step draws images, scores them, and takes some optimiser steps towards those better than their group.

    All that is random follows from the seed and the number of the step, so that runs resume exactly.
    """

    config_class: ClassVar[type[RewardConfig]] = GRPOConfig
    config: GRPOConfig

    @property
    def total_updates(self) -> int:
        """`updates` for each rollout."""
        return self.config.steps * self.config.updates

    @property
    def probe_steps(self) -> int:
        """Of the deterministic sampler."""
        return self.config.probe_sampling_steps

    def check_settings(self) -> None:
        """Refuse switches that do not go together, before anything is loaded."""
        super().check_settings()
        self.config.check()

    def prepare(self) -> Any:
        """As every trainer on rewards, once the numbers of images are known to fit."""
        self.config.check_groups(self.accelerator.num_processes)
        return super().prepare()

    def connect(self, pipeline: DiffusionPipeline) -> None:
        """Settle how noise is added, which depends on the model's family."""
        super().connect(pipeline)
        config, unet = self.config, pipeline_family(pipeline) in ("sdxl", "sd15")
        kind = config.stochastic_sampler
        if kind == "auto" or (kind == "dance-sde" and unet):  # DanceGRPO's script for SD takes DDIM
            kind = "ddim" if unet else "flow-sde"
        self.kind: SamplerKind = kind
        self.level = config.noise_level if config.noise_level is not None else _NOISE_LEVELS[kind]
        if (kind == "ddim") != unet:
            fits = "ddim" if unet else "flow-sde, dance-sde or cps"
            raise InputError(f"stochastic_sampler {kind} is not for this model; set it to {fits}")
        if kind in ("ddim", "cps") and self.level > 1:
            raise InputError(f"noise_level {self.level:g} is above 1, the most that {kind} can add; lower it")
        if pipeline_family(pipeline) == "flux" and config.guidance == 1:
            self.warn("FLUX's guidance is a number that the network is told, not classifier-free; it is made for 3.5")
        self.tree = grow_tree(config.sampling_steps, config.splits)
        clip = config.clip_range if config.clip_range is not None else _CLIP_RANGES[config.ratio]
        self._clip = lambda dims: scaled_clip_range(clip, dims)
        self.panels = {
            **self.panels,
            "ratio of densities": ("ratio_mean",),
            "clipped": ("clipped_high", "clipped_low"),
            "spread in a group": ("group_std",),
        }

    def adapt(self, network: nn.Module, family: str) -> Adaptation:
        """With a reference where the loss has a divergence from it."""
        return make_adaptation(network, self.config, family, reference=self.config.kl_weight > 0)

    def batches(self, data: TrainingData, start: int) -> Iterator[list[PromptBatch]]:
        """For each step this process's images: in batches, a group over several processes; or a tree at a time."""
        config, rank, count = self.config, self.accelerator.process_index, self.accelerator.num_processes
        images = config.batch_size * config.accumulation * count
        tree = config.rollout == "tree"
        size = config.group_size if tree else config.batch_size
        for step in range(start, config.steps):
            firsts = range(step * images + rank * size, (step + 1) * images, size * count)
            # A tree is one image until it splits.
            yield [
                self.prompts.images(range(first, first + (1 if tree else size)), config.group_size) for first in firsts
            ]

    def update(self, batches: Sequence[PromptBatch]) -> dict[str, float]:
        """Draw, score, compare, and take `updates` optimiser steps."""
        config = self.config
        window = range(config.sampling_steps - 1)
        if config.rollout == "independent":
            window = draw_noise_window(
                config.noise_window, config.sampling_steps, self.step, stream(config.seed, "noise window", self.step)
            )
        trained = self._trained_steps(window)
        policy = self._policy(window)
        # What a node of a tree is worth goes by the densities of all steps below it.
        rollouts = [self._draw(policy, batch, window if config.splits else trained) for batch in batches]
        values, items = self._compared(batches, rollouts)
        items = [[item for item in unit if item.step.number in trained] for unit in items]
        self._drawing, self._ratios = policy, dict[int, list[Tensor]]()
        weights = step_weights(
            [policy.steps(self.sampler.scheduler)[number] for number in trained],
            config.step_weight,
            normalize=config.normalize_weights,
        )
        self._weights_of = dict(zip(trained, weights, strict=True))
        parts = []
        for number in range(config.updates):
            first, end = (len(items) * n // config.updates for n in (number, number + 1))
            if (found := self._step([item for unit in items[first:end] for item in unit])) is not None:
                parts.append(found)
            if number == 0:  # nothing had been updated before these passes
                ratios = [ratio for of in self._ratios.values() for ratio in of]
                self._error = max((float((ratio - 1).abs().max()) for ratio in ratios), default=0.0)
        if not parts and "equal rewards" not in self._warned:
            self._warned.append("equal rewards")
            self.warn(f"step {self.step + 1}: all rewards of a group are equal, in every group; nothing was learnt")
        for name in parts[0] if parts else ():
            values[name] = float(np.mean([part[name] for part in parts]))
        values |= self._ratio_values()
        self._check_ratio(values)
        return values

    def loss(self, item: _Item) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """The clipped objective of a forward pass; values a transition."""
        config, graded, policy = self.config, item.step, self._drawing
        call = self._call(item.batch, graded.roots)
        means, step = policy.mean(call, graded)
        mean, old_mean = means[graded.parents], graded.mean[graded.parents]
        log_prob = policy.log_prob(graded.samples, mean, step)
        if config.ratio == "guard":
            ratio = guarded_ratio(mean, old_mean, step.std, log_prob=log_prob, old_log_prob=graded.log_prob)
        else:
            ratio = plain_ratio(log_prob, graded.log_prob)
        advantages, kept = item.advantages.to(ratio), item.kept.to(ratio)
        weight = self._weights_of[graded.number]
        divergence = gaussian_divergence(mean.detach(), old_mean, step.std)
        values = {"kl_from_rollout": divergence}
        if config.trust == "clip":
            self._dims = mean[0].numel()
            losses, high, low = policy_loss(ratio, advantages, clip=self._clip(self._dims), weight=weight)
            values |= {"clipped_high": high.float(), "clipped_low": low.float()}
        else:
            losses = kl_masked_loss(ratio, advantages, divergence, threshold=config.kl_threshold, weight=weight)
        if config.kl_weight:
            before, _ = policy.mean(call, graded, self.reference)
            spread = step.kl_std if config.kl_form == "released" else step.std
            anchor = gaussian_divergence(means, before, spread)[graded.parents]
            losses = losses + config.kl_weight * anchor
            values["kl"] = anchor.detach()
        self._ratios.setdefault(graded.number, []).append(ratio.detach())
        return (losses * kept).sum() * item.share, values

    def _trained_steps(self, window: range) -> list[int]:
        """A share of the steps that add noise, the same for all images of a rollout."""
        count = max(1, round(self.config.train_share * len(window)))
        order = torch.randperm(len(window), generator=stream(self.config.seed, "trained steps", self.step))
        return sorted(window[place] for place in order[:count].tolist())

    def _policy(self, window: range) -> Policy:
        config, step, made = self.config, self.step, list[Sequence[StochasticStep]]()

        def steps(scheduler: Any) -> Sequence[StochasticStep]:
            if not made:  # the scheduler's timesteps are the same in all runs of a step
                made.append(stochastic_steps(scheduler, self.kind, level=self.level, window=window))
            return made[0]

        def noise(root: int, node: int, shape: Sequence[int]) -> Tensor:
            return torch.randn(tuple(shape), generator=stream(config.seed, "transition", step, root, node))

        constant_free = self.kind == "cps" and config.ratio == "plain"
        return Policy(self.sampler, steps, noise, self.tree, config.branch_scale, constant_free)

    def _draw(self, policy: Policy, batch: PromptBatch, kept: Sequence[int]) -> Rollout:
        """One unit: images of a batch, or a tree. Noise is named by the image's number in the run."""
        own = Policy(
            policy.pipeline,
            policy.steps,
            lambda root, node, shape: policy.noise(batch.ordinals[root], node, shape),
            policy.tree,
            policy.branch_scale,
            policy.constant_free,
        )
        return own.draw(
            lambda roots: self._call(batch, roots), len(batch.prompts), size=self.config.batch_size, kept=kept
        )

    def _call(self, batch: PromptBatch, roots: Sequence[int]) -> dict[str, Any]:
        config = self.config
        whole = config.group_size if config.initial_noise == "group" else 1
        seeds = [batch.ordinals[root] // whole * whole for root in roots]
        generators = [stream(config.seed, "noise", seed) for seed in seeds]
        return self.call([batch.embeddings[root] for root in roots], generators)

    def _compared(
        self, batches: Sequence[PromptBatch], rollouts: Sequence[Rollout]
    ) -> tuple[dict[str, float], list[list[_Item]]]:
        """What to log of the rewards, and for each unit its forward passes with the advantages."""
        from accelerate.utils import gather_object

        config = self.config
        leaves = config.group_size if config.rollout == "tree" else 1
        rows: list[tuple[int, list[float]]] = []
        names: list[str] = []
        for batch, rollout in zip(batches, rollouts, strict=True):
            scores = self._scores(rollout.latents, [prompt for prompt in batch.prompts for _ in range(leaves)])
            names = list(scores)
            ordinals = [ordinal + leaf for ordinal in batch.ordinals for leaf in range(leaves)]
            rows += [(n, [float(scores[name][i]) for name in names]) for i, n in enumerate(ordinals)]
        everything = sorted(gather_object(rows))
        numbers = torch.tensor([ordinal for ordinal, _ in everything])
        scored = torch.tensor([of for _, of in everything], dtype=torch.float64)
        rewards, groups = scored[:, 0], numbers // config.group_size
        spread = torch.stack([rewards[groups == group].std(unbiased=False) for group in groups.unique()])
        values = {"reward": float(rewards.mean()), "reward_std": float(rewards.std(unbiased=False))}
        values |= {f"reward_{name}": float(scored[:, i].mean()) for i, name in enumerate(names) if i}
        values |= {"group_std": float(spread.mean()), "equal_groups": float((spread == 0).double().mean())}
        values["denoiser_calls"] = float(sum(gather_object([rollout.denoiser_calls for rollout in rollouts])))
        place = {int(number): i for i, number in enumerate(numbers)}
        if config.rollout == "tree":
            own = {n: rewards[place[n] : place[n] + leaves] for batch in batches for n in batch.ordinals}
            units = [
                self._tree_items(batch, rollout, own[batch.ordinals[0]])
                for batch, rollout in zip(batches, rollouts, strict=True)
            ]
            return values, units
        advantages, excluded = self._advantages(scored, groups)
        kept = (advantages != 0) & ~excluded
        units = []
        for batch, rollout in zip(batches, rollouts, strict=True):
            mine = torch.tensor([place[n] for n in batch.ordinals])
            units.append([_Item(step, batch, advantages[mine], kept[mine].double()) for step in rollout.steps])
        return values, units

    def _scores(self, latents: Float[Tensor, "n ..."], prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """By name, the reward first, then its terms."""
        images: list[Tensor] = []
        with torch.no_grad():
            for piece in latents.split(self.config.batch_size):
                images += self.decode(piece)[0].cpu()
        if isinstance(self.reward, WeightedSum):
            terms = {name: (weight, reward(images, prompts)) for name, (weight, reward) in self.reward.terms.items()}
            total = np.sum([weight * scores for weight, scores in terms.values()], axis=0)
            return {"": total, **{name: scores for name, (_, scores) in terms.items()}}
        return {"": self.reward(images, list(prompts))}

    def _advantages(self, scored: Float[Tensor, "n terms"], groups: Tensor) -> tuple[Tensor, Tensor]:
        """Of all images of a step, and which of them train nothing."""
        if self.config.aggregate == "rewards" or not isinstance(self.reward, WeightedSum):
            return self._advantages_of(scored[:, 0], groups)
        total, excluded = torch.zeros(len(scored), dtype=torch.float64), torch.ones(len(scored), dtype=torch.bool)
        for column, (weight, _) in enumerate(self.reward.terms.values(), 1):
            advantages, left_out = self._advantages_of(scored[:, column], groups)
            total, excluded = total + weight * advantages, excluded & left_out
        return total, excluded

    def _advantages_of(self, rewards: Float[Tensor, " n"], groups: Tensor) -> tuple[Tensor, Tensor]:
        kind = self.config.advantage
        if kind == "median":
            return median_advantages(rewards, groups, floor=_LEAST_SPREAD)
        how: dict[str, Any] = {"scale": "global" if kind == "global-std" else "group"}
        if kind == "dance":
            how |= {"ddof": 1, "eps": 1e-8}
        return group_advantages(rewards, groups, **how), torch.zeros(len(rewards), dtype=torch.bool)

    def _tree_items(self, batch: PromptBatch, rollout: Rollout, rewards: Float[Tensor, " leaves"]) -> list[_Item]:
        """Depth-wise advantages of a tree's edges."""
        config, tree = self.config, self.tree
        log_probs = torch.zeros(len(tree.parent), dtype=torch.float64)
        for step in rollout.steps:
            log_probs[step.nodes] = step.log_prob.double().cpu()
        fused = fuse_rewards(tree, rewards, log_probs, beta=config.fusion)
        advantages = depth_advantages(tree, fused)
        kept = keep_edges(tree, advantages, width=config.pruning, split_steps=config.splits) & (advantages != 0)
        return [_Item(step, batch, advantages[step.nodes], kept[step.nodes].double()) for step in rollout.steps]

    def _step(self, items: Sequence[_Item]) -> dict[str, float] | None:
        """One optimiser step; `None` where no image of any process trains anything."""
        count = self.accelerator.num_processes
        kept = torch.tensor(float(sum(float(item.kept.sum()) for item in items)), device=self.accelerator.device)
        total = float(self.accelerator.reduce(kept, "sum")) if count > 1 else float(kept)
        if not total:
            return None
        if count == 1:  # several processes have to take as many forward passes
            items = [item for item in items if item.kept.any()]
        for item in items:
            item.advantages = item.advantages.clamp(-MAX_ADVANTAGE, MAX_ADVANTAGE)
            item.share = len(items) * count / total  # the learner takes means over forward passes and processes
        return self.learner.step(items, self.loss)

    def _ratio_values(self) -> dict[str, float]:
        """Mean and spread of the ratio over all transitions, and at each step of the sampler."""
        from accelerate.utils import gather_object

        own = [(number, ratio) for number, parts in self._ratios.items() for ratio in torch.cat(parts).tolist()]
        everything, errors = gather_object(own), gather_object([self._error])
        if not everything:
            return {}
        ratios = np.array([ratio for _, ratio in everything])
        numbers = np.array([number for number, _ in everything])
        values = {"ratio_mean": float(ratios.mean()), "ratio_std": float(ratios.std())}
        for number in sorted(set(numbers.tolist())):
            values[f"ratio_mean_{number}"] = float(ratios[numbers == number].mean())
            values[f"ratio_std_{number}"] = float(ratios[numbers == number].std())
        values["ratio_error"] = max(errors)  # of what came before the first update, where it should be 0
        return values

    def _check_ratio(self, values: Mapping[str, float]) -> None:
        """Warn once of ratios that are off before anything was updated, by more than what the clip tells apart."""
        error = values.get("ratio_error", 0.0)
        if not error or self.config.trust != "clip" or "ratio" in self._warned:
            return
        if error > (clip := self._clip(self._dims)) / 2:
            self._warned.append("ratio")
            self.warn(
                f"step {self.step + 1}: ratios differ from 1 by {error:.2g} before the first update, and the clip "
                f"range is {clip:.2g}: the network does not answer twice alike; set dtype to float32"
            )
