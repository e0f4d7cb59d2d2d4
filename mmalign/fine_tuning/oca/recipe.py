"""What is trained and how: the published recipe as numbers that can be changed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...checks import at_least, in_range, one_of
from ...errors import InputError
from ...orthogonal import ORTHOGONAL_MAPS, OrthogonalMap

__all__ = ["Recipe"]


@dataclass(frozen=True)
class Recipe:
    """The recipe of arXiv 2408.08793's code for CIFAR-100; see `fine_tune_compatible` for what each number is.

    Raises:
        InputError: a number out of its range.
    """

    extra_dim: int = 32
    epochs: int = 100
    warmup_epochs: int = 5
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 2**-15
    label_smoothing: float = 0.1
    weights: tuple[float, float, float] = (5.0, 10.0, 5.0)
    orthogonal_map: OrthogonalMap = "cayley"
    image_size: int = 224
    flip: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("extra_dim", "warmup_epochs", "seed"):
            at_least(name, getattr(self, name), 0)
        at_least("epochs", self.epochs)
        at_least("batch_size", self.batch_size, 2)
        at_least("image_size", self.image_size, 8)
        in_range("learning_rate", self.learning_rate, 1e-12, 1e6)
        in_range("weight_decay", self.weight_decay, 0)
        in_range("label_smoothing", self.label_smoothing, 0, 1)
        one_of("orthogonal_map", self.orthogonal_map, ORTHOGONAL_MAPS)
        if len(self.weights) != 3:
            raise InputError(f"weights are {self.weights!r}; give three, of ce, bct and cos")
        for weight in self.weights:
            in_range("weights", weight, 0)
        if not any(self.weights):
            raise InputError("weights are all 0, which leaves nothing to learn; give one above 0")
        if self.warmup_epochs >= self.epochs:
            raise InputError(
                f"warmup_epochs is {self.warmup_epochs} and epochs {self.epochs}; give fewer warm-up epochs, e.g. "
                f"{self.epochs // 10}"
            )

    def learning_rate_in(self, epoch: int) -> float:
        """Rises in equal steps over the warm-up epochs, then falls by half a cosine, never to 0; constant in an epoch.

        The authors' scheduler is named "cosine with 5 warm-up epochs" and no further: the steps are ours.
        """
        if epoch < self.warmup_epochs:
            return self.learning_rate * (epoch + 1) / (self.warmup_epochs + 1)
        way = (epoch - self.warmup_epochs) / (self.epochs - self.warmup_epochs)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * way))
