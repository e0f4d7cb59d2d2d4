"""Where an image lands on the training canvas, and the size conditioning that tells SDXL so (arXiv 2307.01952, 2.2).

A pair shares everything: the loser is brought to the winner's canvas by way of image 0's size, crops and flips are
the same for both, and one row of six numbers describes both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float, UInt8
from torch import Tensor

__all__ = ["Placement", "aspect_buckets", "nearest_bucket", "pixels", "place"]


@dataclass(frozen=True, slots=True)
class Placement:
    """All sizes are (height, width) in pixels: `original` as decoded, `resized` before and `target` after the crop."""

    original: tuple[int, int]
    resized: tuple[int, int]
    crop_top_left: tuple[int, int]
    target: tuple[int, int]

    @property
    def time_ids(self) -> tuple[int, ...]:
        """SDXL's six: original height and width, crop top and left, target height and width."""
        return (*self.original, *self.crop_top_left, *self.target)


def place(original: tuple[int, int], target: tuple[int, int]) -> Placement:
    """Cover `target` with an image of size `original` and crop the centre.

    For a pair, `original` is the size of image 0: image 1 is resized to it, and the aspect ratio that image 1 had
    does not survive. As in the released code of MaPO, the side that overlaps is truncated to whole pixels, half
    pixels of the crop are rounded to even, and a flip does not move the crop's coordinates.
    """
    height, width = original
    tall = height * target[1] >= width * target[0]
    if tall:
        resized = (max(target[0], int(target[1] * height / width)), target[1])
    else:
        resized = (target[0], max(target[1], int(target[0] * width / height)))
    top, left = (round((side - wanted) / 2) for side, wanted in zip(resized, target, strict=True))
    return Placement(original, resized, (top, left), target)


def pixels(
    image: UInt8[Tensor, "3 height width"], placement: Placement, *, flip: bool = False
) -> Float[Tensor, "3 target_height target_width"]:
    """Resize (bilinear, antialiased), crop, perhaps mirror, and scale to [-1, 1].

    An image 1 goes to its final size at once, not through image 0's size: same geometry, one interpolation less.
    """
    from torchvision.transforms.v2 import functional

    sized = functional.resize(image.float(), list(placement.resized), antialias=True)
    cropped = functional.crop(sized, *placement.crop_top_left, *placement.target)
    return (cropped.flip(-1) if flip else cropped) / 127.5 - 1


def aspect_buckets(resolution: int, *, step: int = 64, max_aspect: float = 2.0) -> list[tuple[int, int]]:
    """Canvases (height, width) of at most resolution^2 pixels, sides multiples of `step`, aspects to `max_aspect`.

    They are those of SDXL's training (appendix I) at 1024 and step 64, up to the aspect ratio.
    """
    limit = resolution * resolution
    found = set()
    for height in range(step, math.floor(resolution * math.sqrt(max_aspect)) + 1, step):
        width = limit // height // step * step
        if width and max(height / width, width / height) <= max_aspect:
            found |= {(height, width), (width, height)}
    return sorted(found) or [(resolution, resolution)]


def nearest_bucket(original: tuple[int, int], buckets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The bucket whose aspect ratio is nearest on a logarithmic scale; the larger of equals."""
    aspect = math.log(original[0] / original[1])
    return min(buckets, key=lambda size: (abs(math.log(size[0] / size[1]) - aspect), -size[0] * size[1]))
