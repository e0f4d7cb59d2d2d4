"""Encoders that know colours, one better than the other, for the tests of upgrades.

An image is its mean colour, a text of three numbers ("200 40 7") that colour, any other text one by chance. A colour
becomes 12 smooth features, the same for all of these encoders; an encoder turns them into its own space by a fixed
random rotation, and adds noise that depends on the very pixels or words: the more, the weaker it is. `colour:weak` has
16 dimensions, `colour:strong` 24, `colour:images` is the strong one without texts; `colour:trained` is as good and
says, as `CompatibleEncoder` does, that its first 16 dimensions are those of the weak one. Importing this module makes
them known to `load_encoder`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mmalign.encoders import Encoder, register_source
from mmalign.imaging import ImagePreprocessing

FEATURES = 12
SPECS = {"weak": (16, 0.45, 1), "strong": (24, 0.08, 2), "images": (24, 0.08, 3), "trained": (24, 0.08, 4)}


class ColourEncoder(Encoder):
    """See the module. `before_batch` may raise, or wait, before each batch of images."""

    source = "colour"

    def __init__(self, name: str) -> None:
        dim, self.noise, seed = SPECS[name]
        half = (0.5, 0.5, 0.5)
        preprocessing = ImagePreprocessing(size=(8, 8), resize="squash", mean=half, std=half)
        random = np.random.default_rng(seed)
        rotation = np.linalg.qr(random.standard_normal((dim, dim)))[0][:FEATURES]
        if name == "trained":
            weak = ColourEncoder("weak")
            self.compatible_with = weak.fingerprint
            rotation = np.hstack([weak.model.rotation.numpy(), 0.3 * rotation[:, : dim - weak.dim]])
        model = nn.Module()
        model.register_buffer("rotation", torch.from_numpy(rotation.astype(np.float32)))
        super().__init__(model, spec=f"colour:{name}", dim=dim, preprocessing=preprocessing)
        self.name = name
        self.encoded = 0
        self.before_batch: Callable[[], None] = lambda: None

    @property
    def modalities(self) -> frozenset[str]:
        return frozenset({"image"} if self.name == "images" else {"image", "text"})

    def image_features(self, pixel_values: Tensor) -> Tensor:
        self.before_batch()
        self.encoded += len(pixel_values)
        return torch.stack([self._place(row.mean(dim=(1, 2)).numpy() / 2 + 0.5, row.numpy()) for row in pixel_values])

    def text_features(self, texts: Sequence[str]) -> Tensor:
        return torch.stack([self._place(colour_of(text), np.frombuffer(text.encode(), np.uint8)) for text in texts])

    def _place(self, colour: np.ndarray, what: np.ndarray) -> Tensor:
        seed = int.from_bytes(hashlib.sha256(what.tobytes()).digest()[:8], "big")
        noise = np.random.default_rng(seed).standard_normal(self.dim) / np.sqrt(self.dim)
        found = smooth(colour) @ self.model.rotation.numpy() + self.noise * noise
        return torch.from_numpy(found.astype(np.float32))

    def describe(self) -> dict[str, Any]:
        return {"noise": self.noise, "texts": self.name != "images"}

    def write(self, folder: Path) -> dict[str, Any]:
        return {"name": self.name}

    @classmethod
    def read(cls, folder: Path, config: dict[str, Any]) -> ColourEncoder:
        return cls(config["name"])


def smooth(colour: np.ndarray) -> np.ndarray:
    """Unit features of a colour in [0, 1]^3, alike for colours alike."""
    random = np.random.default_rng(7)
    waves, shift = 5 * random.standard_normal((3, FEATURES)), random.uniform(0, 2 * np.pi, FEATURES)
    found: np.ndarray = np.cos(colour @ waves + shift)
    return found / np.linalg.norm(found)


def colour_of(text: str) -> np.ndarray:
    """What a text names; a colour by chance if it names none."""
    numbers = re.findall(r"\d+", text)
    if len(numbers) == 3:
        return np.array([int(number) / 255 for number in numbers])
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return np.random.default_rng(seed).random(3)


def paint(path: Path, seed: int) -> str:
    """A picture in one colour, slightly noisy, different for every seed; returns its caption."""
    random = np.random.default_rng((5, seed))
    colour = random.integers(20, 236, 3)
    pixels = np.clip(colour + random.integers(-6, 7, (12, 12, 3)), 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, "PNG")
    return " ".join(map(str, colour))


def paint_folder(folder: Path, count: int) -> Path:
    """`000.png` and so on, with `queries.jsonl` of one caption each beside the folder; returns that file."""
    lines = []
    for number in range(count):
        name = f"{number % 4}/{number:03}.png"
        lines.append(json.dumps({"file": name, "caption": paint(folder / name, number)}))
    captions = folder.parent / f"{folder.name}.jsonl"
    captions.write_text("\n".join(lines))
    return captions


register_source("colour", lambda rest: ColourEncoder(rest))
