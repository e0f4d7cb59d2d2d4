"""How a tower is aligned to a teacher: the published recipe as numbers that can be changed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from ...checks import at_least, in_range, one_of
from ...errors import InputError

__all__ = ["Adaptation", "KernelKind", "Precision", "Recipe"]

Adaptation = Literal["full", "lora"]
KernelKind = Literal["polynomial", "gaussian", "cosine"]
Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Recipe:
    """Numbers of arXiv 2506.02557's command for ViT-L-14; see `align_to_teacher` for what each is.

    Raises:
        InputError: a number out of its range, or one that has no effect beside the others.
    """

    kernel: KernelKind = "polynomial"
    degree: int | None = None
    offset: float | None = None
    sigma: tuple[float, float] | None = None
    train_kernel: bool = False
    kernel_learning_rate: float | None = None
    weight: float = 0.5
    reg_weight: float = 1.0
    adaptation: Adaptation = "full"
    rank: int | None = None
    epochs: float | None = None
    steps: int | None = None
    batch_size: int = 64
    learning_rate: float | None = None
    weight_decay: float = 1e-4
    warmup: float = 0.07
    precision: Precision = "float32"
    gradient_checkpointing: bool = False
    check_every: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        one_of("kernel", self.kernel, get_args(KernelKind))
        one_of("adaptation", self.adaptation, get_args(Adaptation))
        one_of("precision", self.precision, get_args(Precision))
        for name in ("degree", "rank", "steps", "check_every"):
            at_least(name, getattr(self, name))
        at_least("batch_size", self.batch_size, 2)
        at_least("seed", self.seed, 0)
        in_range("epochs", self.epochs, 1e-6)
        in_range("offset", self.offset, 0)
        for name in ("learning_rate", "kernel_learning_rate"):
            in_range(name, getattr(self, name), 1e-12, 1e6)
        for name in ("weight", "reg_weight", "weight_decay"):
            in_range(name, getattr(self, name), 0)
        in_range("warmup", self.warmup, 0, 1)
        if self.sigma is not None and (not isinstance(self.sigma, (tuple, list)) or len(self.sigma) != 2):
            raise InputError(f"sigma is {self.sigma!r}; give two numbers, of the student's kernel and the teacher's")
        for one in self.sigma or ():
            in_range("sigma", one, 1e-12)
        if not self.weight:
            raise InputError("weight is 0, which leaves nothing to learn; give a number above 0")
        if self.train_kernel and self.kernel == "cosine":
            raise InputError("train_kernel is set, and the cosine kernel has no parameter; give another kernel")
        if self.train_kernel and self.offset == 0:
            raise InputError("offset is 0, and its logarithm is what would be trained; give a number above 0")
        for name, effective, beside in (
            ("offset", self.kernel == "polynomial", f"the {self.kernel} kernel"),
            ("degree", self.kernel == "polynomial", f"the {self.kernel} kernel"),
            ("sigma", self.kernel == "gaussian", f"the {self.kernel} kernel"),
            ("rank", self.adaptation == "lora", "adaptation 'full'"),
            ("kernel_learning_rate", self.train_kernel, "a kernel that is not trained"),
            ("epochs", self.steps is None, f"steps {self.steps}"),
        ):
            given = getattr(self, name)
            if given is not None and not effective:
                raise InputError(f"{name} is {given!r}, which has no effect with {beside}; leave it out")

    @property
    def highest_rate(self) -> float:
        """Learning rate of the tower: the paper's 1e-5 for all weights; 1e-4 for a LoRA, which is ours."""
        return self.learning_rate or (1e-5 if self.adaptation == "full" else 1e-4)

    @property
    def kernel_rate(self) -> float:
        """Learning rate of the kernel's parameter."""
        return self.kernel_learning_rate or 1e-3

    def steps_over(self, images: int, batch_size: int) -> int:
        """Optimiser steps of a run: as given, or two epochs."""
        return self.steps or max(1, round((self.epochs or 2.0) * images / batch_size))

    def factor(self, step: int, steps: int) -> float:
        """Of the learning rate in a step, from 0: a straight rise over the warm-up, then half a cosine towards 0."""
        rising = round(self.warmup * steps)
        if step < rising:
            return (step + 1) / (rising + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(steps - rising, 1)))
