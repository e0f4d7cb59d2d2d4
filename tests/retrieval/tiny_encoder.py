"""An encoder of no weight to speak of: 8 x 8 pixels through a fixed random projection, words by their hash.

Importing this module makes it known as `tiny:SEED`, so that other processes can load the indexes made with it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmalign.encoders import Encoder, register_source
from mmalign.imaging import ImagePreprocessing

DIM = 16


class TinyEncoder(Encoder):
    """Counts the images it encodes; `before_batch` may raise, or wait, before each batch."""

    source = "tiny"

    def __init__(self, seed: int = 0) -> None:
        half = (0.5, 0.5, 0.5)
        preprocessing = ImagePreprocessing(size=(8, 8), resize="squash", mean=half, std=half)
        model = nn.Module()
        weights = np.random.default_rng(seed).standard_normal((192, DIM)).astype(np.float32)
        model.register_buffer("projection", torch.from_numpy(weights))
        super().__init__(model, spec=f"tiny:{seed}", dim=DIM, preprocessing=preprocessing)
        self.seed = seed
        self.encoded = 0
        self.before_batch: Callable[[], None] = lambda: None

    def image_features(self, pixel_values: Tensor) -> Tensor:
        self.before_batch()
        self.encoded += len(pixel_values)
        # The sum is taken row by row: a batched product may round differently with the size of the batch.
        return torch.stack([row.flatten() @ self.model.projection for row in pixel_values])

    def text_features(self, texts: Sequence[str]) -> Tensor:
        return torch.from_numpy(np.stack([np.sum([_word(w) for w in text.split()], axis=0) for text in texts]))

    def describe(self) -> dict[str, Any]:
        return {"words": "sha256"}

    def write(self, folder: Path) -> dict[str, Any]:
        return {"seed": self.seed}

    @classmethod
    def read(cls, folder: Path, config: dict[str, Any]) -> TinyEncoder:
        return cls(config["seed"])


def _word(word: str) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(word.lower().encode()).digest()[:4], "big")
    return np.random.default_rng(seed).standard_normal(DIM).astype(np.float32)


def expected_vector(path: Path, seed: int = 0) -> np.ndarray:
    """What the encoder must give for a file of 8 x 8 pixels, worked out without any of the library."""
    from PIL import Image

    with Image.open(path) as image:
        assert image.size == (8, 8)
        pixels = np.asarray(image.convert("RGB"), np.float32).transpose(2, 0, 1) / 255
    features = ((pixels - 0.5) / 0.5).reshape(-1) @ np.random.default_rng(seed).standard_normal((192, DIM))
    return (features / np.linalg.norm(features)).astype(np.float32)


register_source("tiny", lambda rest: TinyEncoder(int(rest)))
