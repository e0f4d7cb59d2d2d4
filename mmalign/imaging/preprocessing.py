"""From upright RGB pixels to an encoder's input, as its authors do it, and differentiably."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ..errors import InputError

__all__ = ["ImagePreprocessing"]

# Beyond this multiple of the target, only the part of the resized image that survives the crop is computed.
_WINDOW_FACTOR = 8


@dataclass(frozen=True)
class ImagePreprocessing:
    """From pixels to an encoder's input: resize, centre crop or pad, normalise.

    uint8 pixels follow the encoders' own Pillow pipelines (open_clip, timm) to one level of 255, rounding of
    sizes and crop offsets included; a Pillow that resizes columns before rows, as recent ones do where it is
    cheaper, differs by more in about one pixel of ten thousand. Float pixels in [0, 1] take the same steps
    differentiably: what the bicubic kernel overshoots is clipped to [0, 1], as Pillow does, while its
    gradient passes unchanged. Half-precision pixels are resized in float32.

    Attributes:
        size: (height, width) of the encoder's input.
        resize: "shortest" resizes by the shorter side and crops the centre, "longest" by the longer side and
            pads with `fill`, "squash" ignores the aspect ratio.
        resize_to: side before the crop, where it is not `size`: the shorter side in pixels, or the (height,
            width) that "shortest" covers, "longest" fits into and "squash" becomes. None is `size`.
        interpolation: kernel.
        mean: per channel, in [0, 1] units.
        std: per channel, in [0, 1] units.
        fill: what "longest" pads with, in [0, 255] units, one value or one per channel.
        antialias: widen the kernel where an image is made smaller, as Pillow does ("nearest" never is widened).
            Without, pixels are what torch's tensor resize gave: for scores that were published so.
        clip: clip the overshoot of float pixels. Pipelines that resize float tensors do not.

    Raises:
        InputError: a setting is out of range, or the pixels are not "*batch 3 h w" of uint8 or float.
    """

    size: tuple[int, int]
    resize: Literal["shortest", "squash", "longest"]
    resize_to: int | tuple[int, int] | None = None
    interpolation: Literal["bicubic", "bilinear", "nearest"] = "bicubic"
    mean: tuple[float, float, float] = field(kw_only=True)
    std: tuple[float, float, float] = field(kw_only=True)
    fill: float | tuple[float, float, float] = 0
    antialias: bool = field(default=True, kw_only=True)
    clip: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        for name, value in vars(self).items():  # JSON has no tuples
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        target = self.size if self.resize_to is None else self.resize_to
        target = target if isinstance(target, tuple) else (target, target)
        if len(self.size) != 2 or min(self.size) < 1 or len(target) != 2 or min(target) < 1:
            raise InputError(f"size {self.size!r} and resize_to {self.resize_to!r} must be at least 1 pixel")
        if self.resize not in ("shortest", "squash", "longest"):
            raise InputError(f"resize must be shortest, squash or longest, not {self.resize!r}")
        if self.interpolation not in _KERNELS:
            raise InputError(f"interpolation must be among {[*_KERNELS]}, not {self.interpolation!r}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise InputError(f"mean {self.mean!r} and std {self.std!r} must have 3 values, std above 0")

    def __call__(
        self, pixels: UInt8[Tensor, "*batch 3 h w"] | Float[Tensor, "*batch 3 h w"]
    ) -> Float[Tensor, "*batch 3 height width"]:
        """Preprocess: uint8 in [0, 255] becomes float32, float in [0, 1] keeps its type and gradient."""
        is_uint8 = pixels.dtype == torch.uint8
        typed = is_uint8 or pixels.is_floating_point()
        if pixels.ndim < 3 or pixels.shape[-3] != 3 or 0 in pixels.shape or not typed:
            found = f"{tuple(pixels.shape)} of {pixels.dtype}"
            raise InputError(f"pixels must be (*batch, 3, height, width) of uint8 or float, not {found}")
        dtype = torch.float32 if is_uint8 else pixels.dtype
        resized = self._resized(pixels.float() if dtype in (torch.float16, torch.bfloat16) else pixels)
        fill = torch.as_tensor(self.fill if self.resize == "longest" else 0, device=pixels.device).expand(3)
        cropped = _center_crop_or_pad(resized, self.size, fill if is_uint8 else fill / 255)
        unit = cropped.to(torch.float32) / 255 if is_uint8 else cropped
        mean, std = (unit.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return ((unit - mean) / std).to(dtype).contiguous()

    def map_boxes(self, boxes: Float[Tensor, "n 4"], height: int, width: int) -> Float[Tensor, "n 4"]:
        """Where boxes of an image lie in the input that it becomes, clipped to what the input shows of the image.

        Args:
            boxes: x0, y0, x1, y1 in pixels of the upright image; whole numbers become float32.
            height: of the image in pixels.
            width: of the image in pixels.

        Returns:
            x0, y0, x1, y1 in pixels of the input. A box that was cropped away is empty: x1 equals x0, or y1 y0.

        Raises:
            InputError: `boxes` has no row of four numbers for each box.
        """
        boxes = torch.as_tensor(boxes)
        if boxes.ndim != 2 or boxes.shape[1] != 4:
            raise InputError(f"boxes have shape {tuple(boxes.shape)}; give a row x0, y0, x1, y1 for each box")
        boxes = boxes if boxes.is_floating_point() else boxes.float()
        mapped = torch.empty_like(boxes)
        sides = zip((1, 0), (height, width), self._resized_size(height, width), self.size, strict=True)
        for column, original, resized, kept in sides:
            crop, pad, shown = _placed(resized, kept)
            ends = boxes[:, column::2] * (resized / original) + (pad - crop)
            mapped[:, column::2] = ends.clamp(pad, pad + shown)
        return mapped

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON types; `from_dict` takes them back.

        `antialias` and `clip` are named where they are off: fingerprints from before there were any stay what they are.
        """
        settings = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return {k: v for k, v in settings.items() if k not in ("antialias", "clip") or not v}

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> ImagePreprocessing:
        """The preprocessing that `to_dict` described.

        Raises:
            InputError: a setting is unknown, missing or out of range.
        """
        known = {entry.name for entry in fields(cls)}
        if not {"size", "resize", "mean", "std"} <= set(settings) <= known:
            raise InputError(f"preprocessing settings must be of {sorted(known)}, not {sorted(settings)}")
        return cls(**settings)

    def resized(self, side: int) -> ImagePreprocessing:
        """The same for squares of another side: what is resized to before a crop changes in proportion.

        Raises:
            InputError: the side is below 1.
        """
        target = self.resize_to
        if isinstance(target, tuple):
            target = (int(target[0] * side / self.size[0]), int(target[1] * side / self.size[1]))
        elif target is not None:
            target = int(target * side / min(self.size))
        return replace(self, size=(side, side), resize_to=target)

    def _resized_size(self, height: int, width: int) -> tuple[int, int]:
        """Size after the resize, before the crop, rounded as torchvision, open_clip and timm do."""
        target = self.resize_to or self.size
        if self.resize == "shortest" and (isinstance(target, int) or target[0] == target[1]):
            side = target if isinstance(target, int) else target[0]
            longer = int(side * max(height, width) / min(height, width))
            return (side, longer) if height <= width else (longer, side)
        target = (target, target) if isinstance(target, int) else target
        if self.resize == "squash":
            return target
        ratios = height / target[0], width / target[1]
        ratio = min(ratios) if self.resize == "shortest" else max(ratios)
        return max(1, round(height / ratio)), max(1, round(width / ratio))

    def _resized(self, pixels: Tensor) -> Tensor:
        from torchvision.transforms.v2.functional import InterpolationMode, resize

        size = self._resized_size(*pixels.shape[-2:])
        if tuple(pixels.shape[-2:]) == size:
            return pixels
        # Pillow's nearest is torch's "nearest-exact".
        mode = InterpolationMode("nearest-exact" if self.interpolation == "nearest" else self.interpolation)
        windows = [want > _WINDOW_FACTOR * kept for want, kept in zip(size, self.size, strict=True)]
        if pixels.dtype == torch.uint8 and not any(windows):
            return resize(pixels, list(size), interpolation=mode, antialias=self.antialias)
        centre: dict[int, Tensor] = {}
        for axis in (-1, -2):
            if windows[axis]:
                low, high, weights = _centre_weights(
                    pixels.shape[axis], size[axis], self.size[axis], self.interpolation, self.antialias
                )
                pixels, centre[axis] = pixels.narrow(axis, low, high - low), weights
        for axis in (-1, -2):  # along rows first, and clipped after each, as uint8 is
            if axis in centre:
                pixels = _weighted(pixels, axis, centre[axis])
            else:
                one_way = [*pixels.shape[-2:]]
                one_way[axis] = size[axis]
                pixels = resize(pixels, one_way, interpolation=mode, antialias=self.antialias)
            if pixels.dtype != torch.uint8 and self.interpolation == "bicubic" and self.clip:
                pixels = pixels + (pixels.clamp(0, 1) - pixels).detach()
        return pixels


def _placed(have: int, want: int) -> tuple[int, int, int]:
    """Of an axis of `have` pixels on one of `want`: pixels cropped before, padded before, and shown."""
    return round(max(have - want, 0) / 2), max(want - have, 0) // 2, min(have, want)


def _center_crop_or_pad(pixels: Tensor, size: tuple[int, int], fill: Tensor) -> Tensor:
    source, target = [], []
    for have, want in zip(pixels.shape[-2:], size, strict=True):
        crop, pad, shown = _placed(have, want)
        source.append(slice(crop, crop + want))
        target.append(slice(pad, pad + shown))
    cropped = pixels[..., source[0], source[1]]
    if tuple(cropped.shape[-2:]) == tuple(size):
        return cropped
    canvas = fill.to(pixels.dtype)[:, None, None].expand(*pixels.shape[:-2], *size).clone()
    canvas[..., target[0], target[1]] = cropped
    return canvas


def _cubic(x: Tensor, a: float = -0.5) -> Tensor:
    x = x.abs()
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


# Reach and weight of Pillow's resampling kernels, by distance in pixels of the coarser grid.
_KERNELS: dict[str, tuple[float, Callable[[Tensor], Tensor]]] = {
    "bicubic": (2.0, _cubic),
    "bilinear": (1.0, lambda x: (1 - x.abs()).clamp(min=0)),
    "nearest": (0.5, lambda x: ((x > -0.5) & (x <= 0.5)).to(x.dtype)),
}


def _centre_weights(
    length: int, resized: int, kept: int, interpolation: str, antialias: bool
) -> tuple[int, int, Tensor]:
    """For the `kept` central positions of an axis resized to `resized`: source window and its weights."""
    reach, kernel = _KERNELS[interpolation]
    if interpolation == "bicubic" and not antialias:
        kernel = partial(_cubic, a=-0.75)  # torch's; its antialiased kernel is Pillow's
    scale = length / resized
    stretch = max(scale, 1.0) if interpolation != "nearest" and antialias else 1.0
    first = round((resized - kept) / 2)
    centres = (torch.arange(first, first + kept, dtype=torch.float64) + 0.5) * scale
    low = max(int(centres[0] - reach * stretch) - 1, 0)
    high = min(int(centres[-1] + reach * stretch) + 2, length)
    weights = kernel((torch.arange(low, high, dtype=torch.float64) + 0.5 - centres[:, None]) / stretch)
    return low, high, weights / weights.sum(dim=1, keepdim=True)


def _weighted(pixels: Tensor, axis: int, weights: Tensor) -> Tensor:
    is_uint8 = pixels.dtype == torch.uint8
    window = (pixels.float() if is_uint8 else pixels).movedim(axis, -1)
    result = (window @ weights.T.to(window)).movedim(-1, axis)
    return result.round().clamp(0, 255).to(torch.uint8) if is_uint8 else result
