"""The contract between whatever scores images and whatever filters, picks or trains by the scores."""

from __future__ import annotations

import os
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from mmalign.errors import InputError, MMAlignError, reason_of
from mmalign.imaging import read_image

__all__ = ["AnyReward", "Reward", "as_reward"]

_BATCH = 16


class Reward(ABC):
    """Scores images, each with its prompt; a larger number is a better image.

    Attributes:
        name: a short one, for columns and logs.
        differentiable: whether gradients of `score` reach the pixels.
        uses_text: whether the prompt counts.
        range: lowest and highest value that it can give, `None` for an open end.
        fingerprint: says which reward this is, weights included, so that scores can be kept between runs; `None` where
            nothing says it.
    """

    name: str = "reward"
    differentiable: bool = False
    uses_text: bool = True
    range: tuple[float | None, float | None] = (None, None)
    fingerprint: str | None = None

    @abstractmethod
    def score(
        self, images: Sequence[Float[Tensor, "3 height width"]], prompts: Sequence[str]
    ) -> Float[Tensor, " n"] | Sequence[float]:
        """A number for each image; images in [0, 1], each of its own size, one prompt each."""

    def score_terms(
        self, images: Sequence[Float[Tensor, "3 height width"]], prompts: Sequence[str]
    ) -> tuple[Float[Tensor, " n"] | Sequence[float], dict[str, Float[Tensor, " n"] | Sequence[float]]]:
        """`score`, and by name the terms that it is made of, where it is made of several."""
        return self.score(images, prompts), {}

    @torch.no_grad()
    def __call__(self, images: Iterable[Any], prompts: str | Sequence[str]) -> Float[np.ndarray, " n"]:
        """Scores without gradients, in batches.

        Args:
            images: what `mmalign.imaging.read_image` takes, generated images, or float tensors `3 height width` in
                [0, 1], which are scored as they are.
            prompts: one for each image, or one for all.

        Returns:
            float32, in the reward's own units.

        Raises:
            InputError: one image instead of a list, another number of prompts than of images, or `score` did not give
                one number an image.
            UnreadableImageError: an image cannot be read.
        """
        if isinstance(images, (str, bytes, os.PathLike, Image.Image)) or getattr(images, "ndim", 4) == 3:
            raise InputError("images are one image; give a list, of one if need be")
        images = list(images)
        prompts = [prompts] * len(images) if isinstance(prompts, str) else list(prompts)
        if len(prompts) != len(images):
            raise InputError(f"{len(prompts)} prompts for {len(images)} images; give one each, or one for all")
        scores: list[float] = []
        for start in range(0, len(images), _BATCH):
            batch = slice(start, start + _BATCH)
            scores += _checked(self.score([_pixels(image) for image in images[batch]], prompts[batch]), images[batch])
        return np.array(scores, np.float32)


AnyReward: TypeAlias = "Reward | Callable[[Sequence[Tensor], Sequence[str]], Any]"


def as_reward(reward: AnyReward) -> Reward:
    """A reward, or a callable with the arguments of `Reward.score`, as a reward.

    Attributes `name`, `differentiable`, `uses_text` and `fingerprint` of the callable are kept.

    Raises:
        InputError: it is neither.
    """
    if isinstance(reward, Reward):
        return reward
    if not callable(reward) or isinstance(reward, type):
        raise InputError(f"{reward!r} is no reward; give a Reward, or a callable of images and prompts")
    return _CallableReward(reward)


class _CallableReward(Reward):
    def __init__(self, function: Callable[[Sequence[Tensor], Sequence[str]], Any]) -> None:
        self._function = function
        self.name = str(getattr(function, "name", None) or getattr(function, "__name__", type(function).__name__))
        self.differentiable = bool(getattr(function, "differentiable", False))
        self.uses_text = bool(getattr(function, "uses_text", True))
        self.fingerprint = getattr(function, "fingerprint", None)

    def score(self, images: Sequence[Tensor], prompts: Sequence[str]) -> Any:
        try:
            return self._function(images, prompts)
        except (MMAlignError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise InputError(
                f"reward {self.name!r} failed at {place.filename}:{place.lineno} ({type(error).__name__}: "
                f"{reason_of(error)}); mend it there"
            ) from error


def _pixels(image: Any) -> Float[Tensor, "3 height width"]:
    if isinstance(image, Tensor) and image.is_floating_point():
        return image
    return read_image(getattr(image, "image", image)).pixels.float() / 255


def _checked(scores: Any, images: Sequence[Any]) -> list[float]:
    try:
        numbers = [float(score) for score in scores]
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several numbers
        raise InputError(
            f"the reward returned {type(scores).__name__}; it must give a number for each image of a list"
        ) from None
    if len(numbers) != len(images):
        raise InputError(
            f"the reward returned {len(numbers)} numbers for {len(images)} images; it must give one for each"
        )
    return numbers
