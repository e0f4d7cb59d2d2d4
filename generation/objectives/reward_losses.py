"""What is minimised so that a reward rises: the outer losses of direct reward fine-tuning."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from mmalign.errors import InputError

__all__ = ["RewardLoss", "reward_loss"]

RewardLoss = Literal["negative", "target", "hinge"]


def reward_loss(
    rewards: Float[Tensor, " n"], kind: RewardLoss = "negative", *, threshold: float | None = None, scale: float = 1.0
) -> Float[Tensor, " n"]:
    """The loss of each image; their mean is what AlignProp, DRaFT, ReFL and SRPO minimise.

    Args:
        rewards: with graph, in the reward's own units.
        kind: "negative" is -r (DRaFT, arXiv 2309.17400; also TRL's 10 - r and HPS's 1 - r, which differ by a
            constant); "target" is |r - threshold| (AlignProp's aesthetic loss: threshold 10, scale 0.01); "hinge" is
            max(threshold - r, 0), which lets go of images that are good enough (ReFL: threshold 2, scale 1e-3; SRPO:
            threshold 0.7).
        threshold: of "target" and "hinge".
        scale: times the loss.

    Raises:
        InputError: another kind, or one that lacks its threshold.
    """
    if kind == "negative":
        return -scale * rewards
    if kind not in ("target", "hinge"):
        raise InputError(f"loss is {kind!r}; give negative, target or hinge")
    if threshold is None:
        raise InputError(f"loss {kind!r} needs a threshold in the reward's own units; give reward_threshold")
    missing = threshold - rewards
    return scale * (missing.abs() if kind == "target" else missing.relu())
