"""AlignProp, DRaFT, ReFL and Direct-Align: a reward's gradient through the sampler, by `generation.reward_gradient`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmalign.errors import InputError

from ..objectives.gradient_steps import check_gradient_steps
from ..objectives.reward_losses import reward_loss
from ..pipelines import pipeline_family
from ..reward_gradient import RewardGradientOptions, graded_latents
from ..training.adaptation import Adaptation, make_adaptation
from ..training.configuration import inherited, setting, settings
from ..training.prompt_set import PromptBatch
from ..training.randomness import stream
from ..training.reward_training import RewardConfig, RewardTrainer

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

__all__ = [
    "AlignPropConfig",
    "AlignPropTrainer",
    "DRaFTConfig",
    "DRaFTLVConfig",
    "DRaFTLVTrainer",
    "DRaFTTrainer",
    "DirectAlignConfig",
    "DirectAlignTrainer",
    "ReFLConfig",
    "ReFLTrainer",
    "RewardGradientConfig",
    "RewardGradientTrainer",
]


@settings
class RewardGradientConfig(RewardConfig):
    """Switches of `RewardGradientTrainer`; each published method is a set of defaults."""

    gradient_steps: str = setting(
        "last:1",
        "Steps the gradient goes through: all, last:K, uniform[:LOW:HIGH], normal:MEAN:STD, independent, "
        "one[:LOW:HIGH], or a mask such as 0,1,0,1.",
    )
    input_grad: bool = setting(True, "The gradient also goes through the network's input at those steps.")
    reward_input: Literal["sample", "estimate", "renoise", "direct-align"] = setting(
        "sample",
        "What is scored: the sample, the one-step estimate at the last graded step, the sample and re-noised copies, "
        "or its Direct-Align reconstruction.",
    )
    copies: int = setting(2, "Re-noised copies of reward_input renoise.", ge=1)
    inversion: float = setting(0.0, "Share of direct-align steps that go to more noise instead of less.", ge=0, le=1)
    checkpoint_steps: bool = setting(
        True, "Recompute each graded step going backward: memory for one step, whatever their number.", fixed=False
    )
    uncond_grad: bool = setting(True, "Gradient through the unconditional half of guidance as well.")
    loss: Literal["negative", "target", "hinge"] = setting(
        "negative", "-r; |r - reward_threshold|; or max(reward_threshold - r, 0)."
    )
    reward_threshold: float | None = setting(None, "Of the losses target and hinge, in the reward's own units.")
    loss_scale: float = setting(1.0, "Times the loss.", gt=0)
    anchor: Literal["none", "l2", "kl"] = setting("none", "Distance to the model before training, added to the loss.")
    anchor_weight: float = setting(1.0, "Times that distance.", ge=0)
    rank: int = inherited(RewardConfig, "rank", 4)
    steps: int = inherited(RewardConfig, "steps", 200)
    batch_size: int = inherited(RewardConfig, "batch_size", 4)
    accumulation: int = inherited(RewardConfig, "accumulation", 8)
    learning_rate: float = inherited(RewardConfig, "learning_rate", 1e-3)
    weight_decay: float = inherited(RewardConfig, "weight_decay", 0.1)
    max_grad_norm: float = inherited(RewardConfig, "max_grad_norm", 5.0)
    probe_every: int = inherited(RewardConfig, "probe_every", 20)
    checkpoint_every: int = inherited(RewardConfig, "checkpoint_every", 20)

    def in_small(self) -> dict[str, Any]:
        """Also steps that a short run has."""
        small = super().in_small()
        try:
            check_gradient_steps(self.gradient_steps, small["sampling_steps"])
        except InputError:
            single = self.reward_input in ("estimate", "direct-align")
            small["gradient_steps"] = "one" if single else "last:1"
        return small


class RewardGradientTrainer(RewardTrainer):
    """One optimiser step on the reward of images that the model just drew."""

    config_class: ClassVar[type[RewardConfig]] = RewardGradientConfig
    config: RewardGradientConfig

    def check_settings(self) -> None:
        """Refuse switches that do not go together, before anything is loaded."""
        super().check_settings()
        config = self.config
        check_gradient_steps(config.gradient_steps, config.sampling_steps)
        single = config.gradient_steps[:3] == "one" or config.gradient_steps.split(",").count("1") == 1
        if config.reward_input == "direct-align" and not single:
            raise InputError(
                f'reward_input direct-align asks the network once; set gradient_steps to "one", not '
                f"{config.gradient_steps!r}"
            )
        if config.reward_input == "renoise" and config.gradient_steps != "last:1":
            raise InputError(
                f'reward_input renoise repeats the last step; set gradient_steps to "last:1", not '
                f"{config.gradient_steps!r}"
            )
        reward_loss(torch.zeros(1), config.loss, threshold=config.reward_threshold)
        if config.lora_dropout:
            raise InputError("lora_dropout makes the samples another model's; set it to 0 for this method")
        if config.reward_threshold is not None and config.loss == "negative":
            raise InputError("reward_threshold is given and loss negative has none; give loss hinge or target")
        for name, needs in (
            ("copies", "reward_input renoise" if config.reward_input != "renoise" else ""),
            ("inversion", "reward_input direct-align" if config.reward_input != "direct-align" else ""),
            ("anchor_weight", "an anchor" if config.anchor == "none" else ""),
            ("uncond_grad", "guidance above 1" if config.guidance <= 1 else ""),
        ):
            if needs and getattr(config, name) != getattr(type(config)(), name):
                raise InputError(f"{name} {getattr(config, name)} has no effect without {needs}; leave it out")

    def check_reward(self) -> None:
        """It has to have a gradient."""
        if not self.reward.differentiable:
            raise InputError(
                f"reward {self.reward.name!r} has no gradient; give one that has (cosine, clipscore, pickscore, hps, "
                "aesthetic), or set `differentiable = True` on your callable if it keeps the graph"
            )

    def connect(self, pipeline: DiffusionPipeline) -> None:
        """As every trainer on rewards; a divergence is of samplers with noise."""
        super().connect(pipeline)
        if self.config.anchor == "kl" and pipeline_family(pipeline) not in ("sdxl", "sd15"):
            raise InputError("anchor kl is of samplers with noise, and this is a rectified flow; set anchor to l2")

    def adapt(self, network: nn.Module, family: str) -> Adaptation:
        """With a reference where the loss has an anchor."""
        return make_adaptation(network, self.config, family, reference=self.config.anchor != "none")

    def loss(self, batch: PromptBatch) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """The outer loss of the rewards, summed over re-noised copies, and the anchor's distance; values an image."""
        config, first = self.config, batch.ordinals[0]
        call = self.call(batch.embeddings, [stream(config.seed, "noise", n) for n in batch.ordinals])
        options = RewardGradientOptions(
            gradient_steps=config.gradient_steps,
            input_grad=config.input_grad,
            reward_input=config.reward_input,
            copies=config.copies,
            inversion=config.inversion,
            checkpointing=config.checkpoint_steps,
            uncond_grad=config.uncond_grad,
            anchor=config.anchor,
        )
        run = graded_latents(
            self.sampler, call, options, generator=stream(config.seed, "gradient", first), reference=self.reference
        )
        total: Tensor | None = None
        values: dict[str, Tensor] = {}
        for latents in run.scored:
            pixels, saturated = self.decode(latents)
            rewards, terms = self._scored(pixels, batch.prompts)
            saturated = saturated.to(rewards.device)
            losses = reward_loss(rewards, config.loss, threshold=config.reward_threshold, scale=config.loss_scale)
            total = losses.mean() if total is None else total + losses.mean()
            if not values:  # of the sample itself; copies are like it
                values = {"reward": rewards.detach(), "saturated": saturated}
                values |= {f"reward_{name}": of for name, of in terms.items()}
        assert total is not None
        values["graded_steps"] = torch.full_like(values["reward"], len(run.gradient_steps))
        if config.anchor != "none":
            distance = run.distance.to(total.device)
            total = total + config.anchor_weight * distance.mean()
            values["anchor"] = distance.detach()
        return total, values

    def _scored(
        self, pixels: Float[Tensor, "n 3 height width"], prompts: list[str]
    ) -> tuple[Float[Tensor, " n"], dict[str, Tensor]]:
        device = self.accelerator.device
        rewards, terms = self.reward.score_terms(list(pixels), prompts)
        if not isinstance(rewards, Tensor):
            rewards = torch.stack([torch.as_tensor(one) for one in rewards or ()] or [torch.zeros(())])
        if not rewards.requires_grad or rewards.shape != (len(pixels),):
            raise InputError(
                f"reward {self.reward.name!r} gave {tuple(rewards.shape)} "
                f"{'with' if rewards.requires_grad else 'without'} gradient for {len(pixels)} images; it must give one "
                "number each, computed from their pixels by differentiable operations"
            )
        scored = {name: torch.as_tensor(of).detach().float().to(device) for name, of in terms.items()}
        return rewards.float().to(device), scored


@settings
class AlignPropConfig(RewardGradientConfig):
    """Settings of `AlignPropTrainer`.

    The default truncation is the paper's text: the last K steps, K uniform, anew for each batch. The released code
    draws for each step by itself: `gradient_steps` "independent".
    """

    method: ClassVar[str] = "alignprop"
    summary: ClassVar[str] = "AlignProp: reward gradient through the last K steps, K random (arXiv 2310.03739)."

    gradient_steps: str = inherited(RewardGradientConfig, "gradient_steps", "uniform")


class AlignPropTrainer(RewardGradientTrainer):
    """AlignProp (arXiv 2310.03739)."""

    config_class = AlignPropConfig


@settings
class DRaFTConfig(RewardGradientConfig):
    """Settings of `DRaFTTrainer`: DRaFT-K with K = 1; `gradient_steps` "all" is DRaFT.

    Those of the paper's small runs as far as they are known (unverified); clipping is AlignProp's.
    """

    method: ClassVar[str] = "draft"
    summary: ClassVar[str] = "DRaFT-K: reward gradient through the last steps (arXiv 2309.17400)."

    rank: int = inherited(RewardGradientConfig, "rank", 8)
    learning_rate: float = inherited(RewardGradientConfig, "learning_rate", 4e-4)
    steps: int = inherited(RewardGradientConfig, "steps", 2000)
    accumulation: int = inherited(RewardGradientConfig, "accumulation", 1)


class DRaFTTrainer(RewardGradientTrainer):
    """DRaFT-K (arXiv 2309.17400)."""

    config_class = DRaFTConfig


@settings
class DRaFTLVConfig(DRaFTConfig):
    """Settings of `DRaFTLVTrainer`; hyperparameters of the paper are unverified.

    Memory grows with `copies`: each keeps a graded step and a decoding until the step's backward pass.
    """

    method: ClassVar[str] = "draft-lv"
    summary: ClassVar[str] = "DRaFT-LV: DRaFT-1, the last step repeated from fresh noise (arXiv 2309.17400)."

    reward_input: Literal["sample", "estimate", "renoise", "direct-align"] = inherited(
        DRaFTConfig, "reward_input", "renoise"
    )


class DRaFTLVTrainer(RewardGradientTrainer):
    """DRaFT-LV (arXiv 2309.17400)."""

    config_class = DRaFTLVConfig


@settings
class ReFLConfig(RewardGradientConfig):
    """Settings of `ReFLTrainer`: 40 steps without guidance, one of the steps 30 to 39 graded, ImageReward's hinge.

    The threshold of 2 and the scale are ImageReward's; for another reward `loss` "negative" is the safe choice, and
    the default here. The learning rate is that of ImageReward's LoRA script for SDXL.
    """

    method: ClassVar[str] = "refl"
    summary: ClassVar[str] = "ReFL: reward of the one-step estimate at a random late step (arXiv 2304.05977)."

    sampling_steps: int = inherited(RewardGradientConfig, "sampling_steps", 40)
    guidance: float = inherited(RewardGradientConfig, "guidance", 1.0)
    gradient_steps: str = inherited(RewardGradientConfig, "gradient_steps", "one:30:39")
    input_grad: bool = inherited(RewardGradientConfig, "input_grad", False)
    reward_input: Literal["sample", "estimate", "renoise", "direct-align"] = inherited(
        RewardGradientConfig, "reward_input", "estimate"
    )
    learning_rate: float = inherited(RewardGradientConfig, "learning_rate", 1e-4)
    weight_decay: float = inherited(RewardGradientConfig, "weight_decay", 1e-2)
    steps: int = inherited(RewardGradientConfig, "steps", 100)
    batch_size: int = inherited(RewardGradientConfig, "batch_size", 2)
    accumulation: int = inherited(RewardGradientConfig, "accumulation", 4)


class ReFLTrainer(RewardGradientTrainer):
    """ReFL (arXiv 2304.05977)."""

    config_class = ReFLConfig


@settings
class DirectAlignConfig(RewardGradientConfig):
    """Settings of `DirectAlignTrainer`: one network call a sample, at a random noise level.

    SRPO trains so with `loss` "hinge" and `reward_threshold` 0.7, in HPS's units, all weights at learning rate 5e-6;
    the optimiser's settings here are for a LoRA, and ours.
    """

    method: ClassVar[str] = "direct-align"
    summary: ClassVar[str] = "Direct-Align: reward of an image re-noised and restored in one call (arXiv 2509.06942)."

    gradient_steps: str = inherited(RewardGradientConfig, "gradient_steps", "one")
    reward_input: Literal["sample", "estimate", "renoise", "direct-align"] = inherited(
        RewardGradientConfig, "reward_input", "direct-align"
    )
    sampling_steps: int = inherited(RewardGradientConfig, "sampling_steps", 25)
    guidance: float = inherited(RewardGradientConfig, "guidance", 1.0)
    learning_rate: float = inherited(RewardGradientConfig, "learning_rate", 1e-4)
    weight_decay: float = inherited(RewardGradientConfig, "weight_decay", 1e-4)


class DirectAlignTrainer(RewardGradientTrainer):
    """Direct-Align (arXiv 2509.06942)."""

    config_class = DirectAlignConfig
