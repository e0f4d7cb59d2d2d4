"""How well an image compresses as JPEG: the reward of arXiv 2305.13301 that shows whether a trainer trains."""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch
from jaxtyping import Float
from PIL import Image, features
from torch import Tensor

from mmalign.checks import at_least, in_range

from .reward import Reward

__all__ = ["JPEGSize"]


class JPEGSize(Reward):
    """Minus the size of the image's JPEG file in kB (1,000 bytes), or plus with `incompressible`; no gradients.

    Sizes depend on the image's own, and a little on the libjpeg that Pillow came with.

    Attributes:
        incompressible: reward large files.
        quality: of the JPEG, 1 to 95.
    """

    uses_text = False

    def __init__(self, *, incompressible: bool = False, quality: int = 95) -> None:
        at_least("quality", quality)
        in_range("quality", quality, 1, 95)
        self.incompressible, self.quality = incompressible, quality
        self.name = "jpeg-incompressibility" if incompressible else "jpeg-compressibility"
        self.range = (0.0, None) if incompressible else (None, 0.0)
        library = features.version("libjpeg_turbo") or features.version("jpg")
        self.fingerprint = f"{self.name}, quality {quality}, libjpeg {library}"

    @torch.no_grad()
    def score(self, images: Sequence[Float[Tensor, "3 height width"]], prompts: Sequence[str]) -> Float[Tensor, " n"]:
        """Of each image, rounded to 256 levels."""
        sign = 1.0 if self.incompressible else -1.0
        return torch.tensor([sign * self._bytes(image) / 1000 for image in images])

    def _bytes(self, image: Float[Tensor, "3 height width"]) -> int:
        levels = (image.float() * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous()
        buffer = io.BytesIO()
        Image.fromarray(levels.cpu().numpy()).save(buffer, "JPEG", quality=self.quality)
        return buffer.tell()
