"""An image and its objects, as a model takes them: pixels, and which of its tokens each object covers."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..imaging import DEFAULT_DECODING, DecodedImage, DecodeSettings, FileContent, read_file, read_image
from ..query_perturbation import PatchGrid, boxes_to_token_weights
from .boxes import BoxesFile, Detections, Detector, choose_boxes
from .perturbing import grid_of

if TYPE_CHECKING:
    from ..encoders import Encoder
    from .blip2 import Blip2Matcher

__all__ = ["ObjectLoader", "from_planes", "query_phrases", "to_planes"]

# English words that stand between the things a text names.
_BETWEEN = frozenset(
    """
    a an the this that these those some several many few one and or but with without of in on at by to from into onto
    over under above below beside near next behind between through across along around against for as is are was were
    be being been has have there it its his her their who which while
    """.split()  # noqa: SIM905
)


class ObjectLoader:
    """Reads images for a model, finds their objects, and maps them to its tokens; safe to call from many threads.

    Attributes:
        grid: the model's patches.
    """

    def __init__(self, model: Encoder | Blip2Matcher, detector: Detector, max_objects: int) -> None:
        """Takes a model with attention to perturb.

        Raises:
            InputError: the model is of another family; see `perturbing.grid_of`.
        """
        self.model, self.detector, self.max_objects = model, detector, max_objects
        self.grid: PatchGrid = grid_of(model)

    def load(
        self, image: Any, decode: DecodeSettings = DEFAULT_DECODING, *, phrases: Sequence[str] = ()
    ) -> tuple[DecodedImage, Float[Tensor, "3 height width"], Float[Tensor, "objects tokens"]]:
        """An image as it was read, its pixels as the model takes them, and token weights, rows of zeros for no object.

        Objects are looked for at full size, whatever `decode` says of speed. A picture in memory has no file, hence no
        boxes where a boxes file is the detector.

        Raises:
            UnreadableImageError: the image cannot be read.
        """
        if isinstance(image, (str, os.PathLike)):
            image = read_file(image)
        content = image.data if isinstance(image, FileContent) else image if isinstance(image, bytes) else None
        decoded, pixels = self.model.load_image(image, decode)
        weights = torch.zeros(self.max_objects, self.grid.tokens)
        seen = decoded
        if "fast_decode" in decoded.flags:
            seen = read_image(image, max_pixels=decode.max_pixels, tolerate_truncation=decode.tolerate_truncation)
        found = self._detect(seen, content, phrases)
        size = (seen.width, seen.height)
        boxes = torch.from_numpy(choose_boxes(found, size, self.max_objects))
        assert self.model.preprocessing is not None
        if len(boxes):
            weights[: len(boxes)] = boxes_to_token_weights(boxes, size, self.model.preprocessing, self.grid)
        return decoded, pixels, weights

    def _detect(self, image: DecodedImage, content: bytes | None, phrases: Sequence[str]) -> Detections:
        if content is None and isinstance(self.detector, BoxesFile):
            return Detections.none()
        return self.detector.detect(image.pixels, content=content, phrases=phrases)


def to_planes(
    weights: Float[Tensor, "objects tokens"], grid: PatchGrid, size: tuple[int, int]
) -> Float[Tensor, "objects height width"]:
    """Token weights as pictures: each patch filled with its weight, 0 where no patch is. Prefix tokens have none."""
    patches = weights[:, grid.prefix :].reshape(-1, grid.rows, grid.columns)
    filled = patches.repeat_interleave(grid.patch_height, 1).repeat_interleave(grid.patch_width, 2)
    planes = weights.new_zeros(len(weights), *size)
    planes[:, : filled.shape[1], : filled.shape[2]] = filled
    return planes


def from_planes(
    planes: Float[Tensor, "batch objects height width"], grid: PatchGrid
) -> Float[Tensor, "batch objects tokens"]:
    """What `to_planes` was given: one pixel of every patch, zeros before."""
    high, wide = grid.patch_height, grid.patch_width
    patches = planes[..., : grid.rows * high : high, : grid.columns * wide : wide].flatten(-2)
    return torch.cat([patches.new_zeros(*patches.shape[:-1], grid.prefix), patches], dim=-1)


def query_phrases(text: str) -> list[str]:
    """What an English text names, for a detector that looks for phrases: cut at marks, articles and prepositions.

    Any other text comes back nearly whole.
    """
    phrases: list[str] = []
    for part in re.split(r"[^\w\s'-]+", text):
        words: list[str] = []
        for word in [*part.split(), "the"]:
            if word.lower() not in _BETWEEN:
                words.append(word)
            elif words:
                phrases.append(" ".join(words))
                words = []
    return list(dict.fromkeys(phrases)) or [text]
