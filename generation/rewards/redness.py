"""The plainest reward with a gradient: to try a trainer out with, without any weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from .reward import Reward

__all__ = ["Redness"]


class Redness(Reward):
    """How much more red than green and blue an image is on average; -1 for cyan, 0 for gray, 1 for red."""

    name = "redness"
    uses_text = False
    differentiable = True
    range = (-1.0, 1.0)
    fingerprint = "redness"

    def score(self, images: Sequence[Float[Tensor, "3 height width"]], prompts: Sequence[str]) -> Float[Tensor, " n"]:
        """Of each image."""
        return torch.stack([image[0].mean() - image[1:].mean() for image in images])
