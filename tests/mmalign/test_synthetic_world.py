"""The synthetic world of methods/structure.md, section 9, in which STRUCTURE's effect was measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest
import torch

from mmalign.alignment import Alignment, align
from mmalign.metrics import image_text_retrieval

HELD = 1000
LIFT, SLACK = 0.3, 0.02  # what the card asks for


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class World(NamedTuple):
    """n rows to train on, then 1000 held-out ones, of two nearly linear views of 60 classes."""

    n: int
    images: np.ndarray
    texts: np.ndarray

    @classmethod
    def of(cls, n: int, seed: int = 0) -> World:
        rng = np.random.default_rng(seed)
        centres = rng.normal(size=(60, 24))
        first = {width: rng.normal(size=(48, width)) / 5 for width in (256, 192)}
        second = {width: rng.normal(size=(width, width)) / width**0.5 for width in (256, 192)}
        count = n + HELD
        shared = centres[rng.integers(60, size=count)] + 0.6 * rng.normal(size=(count, 24))
        views = []
        for width, shift in ((256, 0.3), (192, -0.2)):
            both = np.concatenate([shared, 0.7 * rng.normal(size=(count, 24))], axis=1)
            views.append((np.tanh(both @ first[width]) @ second[width] + shift).astype(np.float32))
        return cls(n, *views)

    def fit(self, method: str, select_by: str) -> Alignment:
        return align(
            self.images,
            self.texts,
            method=method,
            validation=np.arange(self.n + HELD) >= self.n,
            device="cpu",
            dim=64,
            batch_size=512,
            steps=600,
            learning_rate=1e-3,
            schedule="constant",
            select_by=select_by,
            patience=15,
            evaluate_every=600 if select_by == "last" else 10,
        )

    def hit(self, alignment: Alignment) -> float:
        """R@1 image to text among the held-out pairs."""
        rows = (alignment.encode("image", self.images[self.n :]), alignment.encode("text", self.texts[self.n :]))
        return image_text_retrieval(*rows, np.arange(HELD), ks=(1,))["image_to_text"]["hit@1"]


@pytest.mark.slow
def test_structure_makes_long_training_safe() -> None:
    world = World.of(300)
    alone, structured = (world.fit(method, "last") for method in ("clip", "structure"))
    assert alone.step == structured.step == 600
    assert world.hit(structured) >= world.hit(alone) + LIFT


@pytest.mark.parametrize("n", [100, *(pytest.param(n, marks=pytest.mark.slow) for n in (300, 1000))])
def test_structure_is_not_worse_at_the_best_step(n: int) -> None:
    world = World.of(n)
    alone, structured = (world.fit(method, "mrr") for method in ("clip", "structure"))
    assert world.hit(structured) >= world.hit(alone) - SLACK
    assert world.hit(alone) > 0.3, "both learn"
