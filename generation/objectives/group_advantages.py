"""Advantages: how much better than its group each sample is. The group is all samples of one prompt.

`group_advantages` is GRPO's; `median_advantages` is for small groups of odd size and continuous, noisy rewards.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmalign.checks import one_of
from mmalign.errors import InputError

__all__ = [
    "MAX_ADVANTAGE",
    "AdvantageScale",
    "MedianScale",
    "group_advantages",
    "median_advantages",
]

MAX_ADVANTAGE = 5.0  # every method of the family clamps at it, right before the loss

AdvantageScale = Literal["group", "global", "none"]
MedianScale = Literal["mad", "std", "none"]


def group_advantages(
    rewards: Float[Tensor, " n"],
    groups: Int[Tensor, " n"],
    *,
    scale: AdvantageScale = "group",
    ddof: int = 0,
    eps: float = 1e-4,
) -> Float[Tensor, " n"]:
    """(r - mean of the group) / (std + eps), before the clamp at `MAX_ADVANTAGE`; exactly 0 in groups of one reward.

    The defaults are Flow-GRPO's (arXiv 2505.05470) and GRPO-Guard's. DanceGRPO's (arXiv 2505.07818) are ddof 1 and eps
    1e-8; its form without groups is the same with one and the same group for all.

    Args:
        rewards: in any units.
        groups: the group of each, any whole numbers in any order.
        scale: what divides: "group", the deviation within the group; "global", that of all rewards given, so that
            prompts where the samples differ little count little (Flow-GRPO's `global_std`); "none" (Dr. GRPO,
            arXiv 2503.20783).
        ddof: 0 for the population's deviation, 1 for the sample's.
        eps: added to the deviation.

    Raises:
        InputError: a group of one, or another scale.
    """
    one_of("advantage scale", scale, get_args(AdvantageScale))
    values = _precise(rewards)
    advantages = torch.zeros_like(values)
    for members in _members(groups):
        own = values[members]
        if (own == own[0]).all():  # or the rounding of their mean would be divided by eps
            continue
        advantages[members] = own - own.mean()
        if scale == "group":
            advantages[members] /= own.std(correction=ddof) + eps
    if scale == "global":
        advantages /= values.std(correction=ddof) + eps
    return advantages.to(torch.promote_types(rewards.dtype, torch.float32))


def median_advantages(
    rewards: Float[Tensor, " n"],
    groups: Int[Tensor, " n"],
    *,
    scale: MedianScale = "mad",
    eps: float = 1e-3,
    floor: float = 0.0,
    rescale: bool = False,
) -> tuple[Float[Tensor, " n"], Bool[Tensor, " n"]]:
    """MC-GRPO (arXiv 2601.22582): (r - median of the group) / (median absolute deviation + eps).

    The method draws one sample more than it trains, an odd number a prompt, and leaves the median itself out. Of an
    even group the median is the lower of the two in the middle, as `torch.median`'s.

    Where most rewards of a group are equal their deviation is 0, and the others' advantages are hundreds of times what
    they should be: the clamp at `MAX_ADVANTAGE` is not optional here, and discrete rewards want a `floor`.

    Args:
        rewards: in any units.
        groups: the group of each, any whole numbers in any order.
        scale: what divides: "mad", the median absolute deviation; "std", the population's standard deviation; "none".
        eps: added to it, unless it is "none".
        floor: at least so many standard deviations of the group divide; 0.1 is sensible for discrete rewards.
        rescale: multiply by the group's size over the number of advantages that are not 0 (the released code for
            GSM8K does, that for MATH does not).

    Returns:
        The advantages, before the clamp, and for each sample whether it is the one of its group, equal to the
        median, that is not trained.

    Raises:
        InputError: a group of one, or another scale.
    """
    one_of("advantage scale", scale, get_args(MedianScale))
    values = _precise(rewards)
    advantages, excluded = torch.zeros_like(values), torch.zeros_like(values, dtype=torch.bool)
    for members in _members(groups):
        own = values[members]
        median, place = own.median(dim=0)
        excluded[members[place]] = True
        found = own - median
        if scale != "none":
            std = own.std(correction=0)
            spread = found.abs().median() if scale == "mad" else std
            found = found / (torch.maximum(spread, floor * std) + eps)
        if rescale:
            found = found * (len(own) / max(int(found.count_nonzero()), 1))
        advantages[members] = found
    return advantages.to(torch.promote_types(rewards.dtype, torch.float32)), excluded


def _members(groups: Int[Tensor, " n"]) -> Iterator[Int[Tensor, " group"]]:
    for group in groups.unique():
        members = (groups == group).nonzero()[:, 0]
        if len(members) == 1:
            raise InputError(f"group {int(group)} has one sample, which nothing is compared with; draw two or more")
        yield members


def _precise(rewards: Tensor) -> Tensor:
    return rewards.to(torch.float32 if rewards.device.type == "mps" else torch.float64)
