"""OCA's run of the loop: a timm model, a rotation and a classifier."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ...encoders.compatible import CompatibleEncoder
from ...orthogonal import OrthogonalLinear
from ...orthogonal_compatibility import oca_loss
from ..loop import FLIP, ImageLoop
from .recipe import Recipe

__all__ = ["FineTuning"]


class FineTuning(ImageLoop):
    """Trains `encoder.model`, a rotation and a classifier.

    Attributes:
        history: one line an epoch: `epoch`, from 1, `learning_rate`, and the means over its batches of `loss`, `ce`,
            `bct` and `cos`.
    """

    def __init__(
        self,
        encoder: CompatibleEncoder,
        files: Sequence[Path],
        labels: Int[np.ndarray, " n"],
        prototypes: Float[Tensor, "classes old_dim"],
        recipe: Recipe,
    ) -> None:
        """Takes an encoder on the device to train on, in float32, and as many labels as files."""
        self.recipe = recipe
        self.labels = torch.from_numpy(np.asarray(labels, np.int64))
        self.prototypes = prototypes.to(encoder.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.layer = OrthogonalLinear(encoder.dim, orthogonal_map=recipe.orthogonal_map).to(encoder.device)
            self.classifier = nn.Linear(encoder.dim, len(prototypes), bias=False).to(encoder.device)
        free = [*encoder.model.parameters(), *self.classifier.parameters()]
        optimizer = torch.optim.Adam(
            # Decay would pull the rotation to the base it happened to start from (and undo Householder's diagonal).
            [
                {"params": free, "weight_decay": recipe.weight_decay},
                {"params": list(self.layer.parameters()), "weight_decay": 0.0},
            ],
            lr=recipe.learning_rate,
        )
        size = min(recipe.batch_size, len(files))
        steps = max(1, round(recipe.epochs * len(files) / size))
        super().__init__(encoder, files, optimizer, batch_size=size, steps=steps, seed=recipe.seed)

    def run(self, checkpoint: Path, about: str, *, workers: int | None = None, progress: bool = False) -> None:
        """As `ImageLoop.run`; the model trains in training mode and is left in evaluation mode."""
        self.encoder.model.train()
        super().run(checkpoint, about, workers=workers, progress=progress)
        self.encoder.model.eval()

    def weights(self) -> dict[str, Tensor]:
        """Of all three, running statistics included."""
        parts: dict[str, nn.Module] = {"model": self.encoder.model, "layer": self.layer, "classifier": self.classifier}
        return {
            f"{part}.{name}": value for part, module in parts.items() for name, value in module.state_dict().items()
        }

    def terms(self, images: list[int], pixels: Float[Tensor, "batch 3 height width"]) -> dict[str, Float[Tensor, ""]]:
        """OCA's loss and its three terms."""
        loss = oca_loss(
            self.encoder.image_features(pixels),
            self.labels[images].to(self.encoder.device),
            self.prototypes,
            self.layer,
            self.classifier.weight,
            label_smoothing=self.recipe.label_smoothing,
            weights=self.recipe.weights,
        )
        return {"loss": loss.total, "ce": loss.ce, "bct": loss.bct, "cos": loss.cos}

    def learning_rates(self) -> list[float]:
        """That of the epoch, for both groups."""
        return [self.recipe.learning_rate_in(self._epoch_of(self.step))] * 2

    def ends_line(self) -> bool:
        """With the epoch."""
        return self._epoch_of(self.step) != self._epoch_of(self.step - 1)

    def line(self, means: dict[str, float]) -> dict[str, Any]:
        """Epoch, learning rate, means."""
        epoch = self._epoch_of(self.step - 1)
        return {"epoch": epoch + 1, "learning_rate": self.recipe.learning_rate_in(epoch), **means}

    def pixels_of(self, sample: int, image: int) -> Float[Tensor, "3 height width"]:
        """Mirrored, every other one by chance."""
        pixels = super().pixels_of(sample, image)
        if self.recipe.flip and np.random.default_rng((self.seed, FLIP, sample)).random() < 0.5:
            pixels = pixels.flip(-1)
        return pixels
