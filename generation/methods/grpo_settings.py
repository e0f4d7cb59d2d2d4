"""Settings of GRPO: its switches, and the papers as presets of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from mmalign.errors import InputError

from ..objectives.noise_windows import check_noise_window
from ..training.configuration import inherited, setting, settings
from ..training.presets import GRPO_CARDS, Preset, both
from ..training.reward_training import RewardConfig

__all__ = ["GRPO_PRESETS", "GRPOConfig"]

# What is each paper's own, so that they combine; all else, and how large a run is, stays as it is.
GRPO_PRESETS: dict[str, Preset] = {
    "flow-grpo": both(
        "flow-grpo", ratio="plain", step_weight="none", advantage="global-std", kl_weight=0.04, learning_rate=3e-4
    ),
    "grpo-guard": both(
        "grpo-guard", ratio="guard", step_weight="guard", advantage="group-std", kl_weight=0.0, learning_rate=1e-4
    ),
    # nine images of a prompt, of which the median one trains nothing
    "mc-grpo": both("mc-grpo", advantage="median", group_size=9, batch_size=3),
    "branch-grpo": both(
        "branch-grpo",
        rollout="tree",
        stochastic_sampler="dance-sde",
        sampling_steps=20,
        split_steps="0,3,6,9",
        group_size=16,
        ratio="plain",
        step_weight="none",
        advantage="group-std",
        initial_noise="image",
        kl_weight=0.0,
    ),
    "dance-grpo": both(
        "dance-grpo",
        stochastic_sampler="dance-sde",
        ratio="plain",
        step_weight="none",
        advantage="dance",
        initial_noise="group",
        train_share=0.6,
        kl_weight=0.0,
        learning_rate=1e-5,
    ),
}


_OPTIMISATION = "Optimisation"


@settings
class GRPOConfig(RewardConfig):
    """Settings of `GRPOTrainer`; the defaults are GRPO-Guard's, without classifier-free guidance.

    Its released recipe for SD3.5 differs in size: guidance 4.5, 48 groups of 24 images a step, and a LoRA with alpha 64
    at rank 32.
    """

    method: ClassVar[str] = "grpo"
    summary: ClassVar[str] = "GRPO and its kin: any reward, no gradient of it needed (arXiv 2505.05470, 2510.22319)."
    presets: ClassVar[Mapping[str, Preset]] = {**GRPO_PRESETS, **GRPO_CARDS}
    explanation: ClassVar[str] = (
        RewardConfig.explanation
        + """

A step draws BATCH_SIZE x ACCUMULATION images on each GPU, in groups of
GROUP_SIZE for a prompt, and takes UPDATES optimiser steps on them."""
    )
    example: ClassVar[str] = "PROMPTS OUTPUT --reward pickscore --preset grpo-guard,24gb"

    preset: str | None = setting(
        None,
        f"A paper's settings ({', '.join(GRPO_PRESETS)}), a card ({', '.join(GRPO_CARDS)}), or several with commas "
        "between, later ones winning; your own settings win over all.",
        panel="Options",
        fixed=False,
    )
    group_size: int = setting(8, "Images drawn of each prompt, whose rewards are compared.", ge=2)
    updates: int = setting(2, "Optimiser steps on each rollout, each on its own share of the images.", ge=1)
    stochastic_sampler: Literal["auto", "flow-sde", "dance-sde", "cps", "ddim"] = setting(
        "auto",
        "How noise is added. (auto: flow-sde, or ddim for SD 1.5 and SDXL, where dance-sde means ddim as well)",
    )
    noise_level: float | None = setting(
        None, "Of that noise. (default: flow-sde 0.7, dance-sde 0.3, cps 0.8, ddim 1, its eta)", gt=0
    )
    noise_window: str = setting(
        "all", "Steps that add noise and are trained: all (but the last), random:SIZE[:LOW:HIGH], slide:SIZE:EVERY."
    )
    train_share: float = setting(1.0, "Share of those steps that is trained, drawn anew for each rollout.", gt=0, le=1)
    initial_noise: Literal["image", "group"] = setting("image", "Each image starts from noise of its own, or a group.")
    rollout: Literal["independent", "tree"] = setting(
        "independent", "Images drawn one by one, or as leaves of a tree that splits (BranchGRPO)."
    )
    split_steps: str = setting("0,3,6,9", "Steps at which a tree splits in two; GROUP_SIZE is 2 to their number.")
    branch_scale: float = setting(4.0, "How much of the noise of siblings is their own.", gt=0)
    fusion: float = setting(
        1.0, "Reward of a tree's node: softmax of this times the path's log-density; 0, mean.", ge=0
    )
    pruning: Literal["none", "best", "extremes"] = setting("none", "Edges after the last split that are trained.")
    advantage: Literal["group-std", "global-std", "dance", "median"] = setting(
        "group-std", "What centres and scales rewards of a group; median is MC-GRPO. A tree goes by depth instead."
    )
    aggregate: Literal["rewards", "advantages"] = setting(
        "rewards", "Several rewards: weigh them and take advantages, or weigh the advantages of each."
    )
    ratio: Literal["plain", "guard"] = setting("guard", "Ratio of densities as it is, or normalised (GRPO-Guard).")
    step_weight: Literal["none", "guard", "std"] = setting(
        "guard", "Weight of each step: 1; GRPO-Guard's; or its noise (TempFlow-GRPO)."
    )
    normalize_weights: bool = setting(False, "Scale these to mean 1, so that losses keep their size.")
    trust: Literal["clip", "kl-mask"] = setting("clip", "Limit to an update: clip the ratio, or mask (Flow-DPPO).")
    clip_range: float | None = setting(
        None, "Of the ratio, at 65,536 latent numbers; scaled to this run's. (default: plain 1e-4, guard 2e-6)", gt=0
    )
    kl_threshold: float = setting(1e-5, "Divergence from the weights that drew, above which kl-mask drops.", gt=0)
    kl_weight: float = setting(
        0.0, "Times the divergence from the model before training, of the images that are trained.", ge=0
    )
    kl_form: Literal["released", "exact"] = setting("released", "Without the step's length, as released, or with it.")
    probe_sampling_steps: int = setting(40, "Denoising steps of the probe's images, without added noise.", ge=1)
    guidance: float = inherited(RewardConfig, "guidance", 1.0)
    sampling_steps: int = inherited(RewardConfig, "sampling_steps", 10)
    steps: int = setting(
        300, "Rollouts, each followed by UPDATES optimiser steps.", fixed=False, ge=1, panel=_OPTIMISATION
    )
    batch_size: int = inherited(RewardConfig, "batch_size", 4)
    accumulation: int = setting(12, "Batches of each rollout, per GPU.", ge=1, panel=_OPTIMISATION)
    rank: int = inherited(RewardConfig, "rank", 32)
    learning_rate: float = inherited(RewardConfig, "learning_rate", 1e-4)
    weight_decay: float = inherited(RewardConfig, "weight_decay", 1e-4)
    probe_every: int = inherited(RewardConfig, "probe_every", 20)
    checkpoint_every: int = inherited(RewardConfig, "checkpoint_every", 20)

    def in_small(self) -> dict[str, Any]:
        """Also groups that a short run has, and splits within it; the real run's are checked before.

        Raises:
            InputError: its images are no whole number of groups, or its updates have nothing to share.
        """
        self.check()
        self.check_groups(1)
        size = {"median": 3}.get(self.advantage, 2)
        tree = {"split_steps": "0", "group_size": 2} if self.rollout == "tree" else {}
        small: dict[str, Any] = {"group_size": size, "batch_size": size, "updates": 1, **tree}
        return {**super().in_small(), "noise_window": "all", "probe_sampling_steps": 4, **small}

    def check(self) -> None:
        """Raise InputError for switches that do not go together."""
        check_noise_window(self.noise_window, self.sampling_steps)
        if self.lora_dropout:
            raise InputError("lora_dropout makes what is trained another model than what drew; set it to 0")
        if self.sampler != "ddim" or self.eta:
            raise InputError("sampler and eta are of other methods; set stochastic_sampler and noise_level")
        if self.advantage == "median" and self.rollout == "independent" and self.group_size % 2 == 0:
            raise InputError(
                f"group_size {self.group_size} has no middle; advantage median needs an odd one, such as "
                f"{self.group_size + 1}, of which the median image trains nothing"
            )
        if self.rollout == "tree":
            splits, last = self.splits, self.sampling_steps - 2
            if not splits or splits[0] < 0 or splits[-1] > last:
                raise InputError(
                    f"split_steps {self.split_steps!r} are not all among the steps 0 to {last} that add noise; "
                    "change them, or take more sampling_steps"
                )
            if self.group_size != 2 ** len(splits):
                raise InputError(
                    f"group_size {self.group_size} is not the {2 ** len(splits)} leaves of a tree with "
                    f"{len(splits)} splits; set one of them"
                )
            for name in ("advantage", "noise_window", "initial_noise", "aggregate"):
                if getattr(self, name) != getattr(GRPOConfig(), name):
                    raise InputError(f"{name} {getattr(self, name)!r} is not of trees; leave it out")

    def check_groups(self, processes: int) -> None:
        """Raise InputError where a step's images do not fit into groups and updates."""
        images = self.batch_size * self.accumulation * processes
        whole = self.group_size * (processes if self.rollout == "tree" else 1)
        if images % whole:
            raise InputError(
                f"{images} images a step (batch_size {self.batch_size} x accumulation {self.accumulation} x "
                f"{processes} processes) are no whole number of groups of {self.group_size}"
                + (" on each process" if whole != self.group_size else "")
                + "; change one of them"
            )
        units = images // whole if self.rollout == "tree" else self.accumulation
        if units < self.updates:
            raise InputError(
                f"{self.updates} updates cannot share {units} {'trees' if self.splits else 'batches'} of a step; "
                "lower updates or raise accumulation"
            )

    @property
    def splits(self) -> list[int]:
        """The steps at which a tree splits; none for independent images."""
        if self.rollout == "independent":
            return []
        try:
            return sorted({int(part) for part in self.split_steps.split(",")})
        except ValueError:
            raise InputError(f"split_steps {self.split_steps!r} are no numbers; give such as 0,3,6,9") from None
