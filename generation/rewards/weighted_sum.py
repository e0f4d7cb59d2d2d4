"""Several rewards as one, each with its weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmalign.checks import in_range
from mmalign.errors import InputError

from .reward import AnyReward, Reward, as_reward

__all__ = ["WeightedSum"]


class WeightedSum(Reward):
    """sum_j w_j r_j, the terms in their own units: nothing is rescaled but by the weights.

    Typical values differ between rewards by a factor of 100 (HPS 0.3, PickScore 22); weights have to make up for it.

    Attributes:
        terms: weight and reward by name.
    """

    def __init__(self, terms: Mapping[str, tuple[float, AnyReward]], *, name: str = "sum") -> None:
        """Take weight and reward, or callable, by name.

        Raises:
            InputError: there is none, or a weight is no finite number.
        """
        if not terms:
            raise InputError("there are no rewards to add up; give {name: (weight, reward)}")
        for term, (weight, _) in terms.items():
            in_range(f"weight of {term}", weight)
        self.terms: dict[str, tuple[float, Reward]] = {
            term: (float(weight), as_reward(reward)) for term, (weight, reward) in terms.items()
        }
        self.name = name
        rewards = [reward for _, reward in self.terms.values()]
        self.differentiable = all(reward.differentiable for reward in rewards)
        self.uses_text = any(reward.uses_text for reward in rewards)
        self.range = self._bound(0), self._bound(1)
        if all(reward.fingerprint for reward in rewards):
            self.fingerprint = " + ".join(f"{weight!r} * ({reward.fingerprint})" for weight, reward in self._pairs())

    def score(self, images: Sequence[Float[Tensor, "3 height width"]], prompts: Sequence[str]) -> Float[Tensor, " n"]:
        """The sum; float32, on the device of the first term."""
        return self.score_terms(images, prompts)[0]

    def score_terms(
        self, images: Sequence[Float[Tensor, "3 height width"]], prompts: Sequence[str]
    ) -> tuple[Float[Tensor, " n"], dict[str, Any]]:
        """The sum, and every term by name without its weight.

        Raises:
            InputError: a term gave another number of scores than there are images.
        """
        scores: dict[str, Tensor] = {}
        device: torch.device | None = None
        for term, (_, reward) in self.terms.items():
            found = _row(term, reward.score(images, prompts), len(images))
            device = device or found.device
            scores[term] = found.to(device)
        total = torch.stack([weight * scores[term] for term, (weight, _) in self.terms.items()]).sum(dim=0)
        return total, dict(scores)

    def _pairs(self) -> Iterator[tuple[float, Reward]]:
        yield from self.terms.values()

    def _bound(self, side: int) -> float | None:
        total = 0.0
        for weight, reward in self._pairs():
            bound = reward.range[side if weight >= 0 else 1 - side]
            if weight and bound is None:
                return None
            total += weight * (bound or 0.0)
        return total


def _row(term: str, scores: Any, count: int) -> Float[Tensor, " n"]:
    try:
        if isinstance(scores, Tensor):
            row = scores.float()
        else:
            parts = [torch.as_tensor(score, dtype=torch.float32).reshape(()) for score in scores]
            row = torch.stack(parts) if parts else torch.zeros(0)
        if row.numel() == count:
            return row.reshape(count)
        found = f"scores of shape {tuple(row.shape)}"
    except (TypeError, ValueError, RuntimeError):
        found = type(scores).__name__
    raise InputError(f"reward {term} returned {found} for {count} images; it must give a number for each")
