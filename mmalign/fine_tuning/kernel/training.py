"""Kernel alignment's run of the loop: an image tower against cached features of teacher and original."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import normalize

from ...encoders import Encoder
from ...errors import InputError, NonFiniteLossError
from ...kernel_alignment import (
    CosineKernel,
    GaussianKernel,
    Kernel,
    PolynomialKernel,
    kernel_alignment_loss,
    nearest_pairs_error,
)
from ..loop import ImageLoop
from .recipe import Recipe
from .tower import Tower

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["HeldOut", "KernelAlignmentLoop"]

_LINES = 40  # of a history, where check_every is left open


@dataclass(frozen=True)
class HeldOut:
    """Images that are not trained on, looked at now and then: do the texts still fit?

    Attributes:
        pixels: as the student takes them.
        originals: features before training, not normalised.
        teachers: features of the teacher.
        texts: unit rows of the frozen text tower; may be none.
        owner: the image that each text describes; `None` where texts are of no image.
    """

    pixels: Float[Tensor, "n 3 height width"]
    originals: Float[Tensor, "n dim"]
    teachers: Float[Tensor, "n teacher_dim"]
    texts: Float[Tensor, "m dim"]
    owner: Int[Tensor, " m"] | None = None

    @torch.inference_mode()
    def look(self, encoder: Encoder, student_kernel: Kernel, teacher_kernel: Kernel) -> dict[str, float]:
        """Kernel errors, cosine with the original features, and what texts find now."""
        parts = self.pixels.split(32)
        z = torch.cat([encoder.image_features(part.to(encoder.device)).float() for part in parts])
        z0, t = self.originals.to(z.device), self.teachers.to(z.device)
        loss = kernel_alignment_loss(z, z0, t, student_kernel, teacher_kernel, diagonal=False)
        cosines = torch.cosine_similarity(z, z0)
        found = {
            "held_out_align": loss.align,
            "held_out_nearest": nearest_pairs_error(loss.student, loss.teacher),
            "kept_cosine": cosines.mean(),
            "kept_cosine_p5": cosines.quantile(0.05),
        }
        if len(self.texts):
            texts = self.texts.to(z.device)
            now, before = (normalize(rows, dim=1) @ texts.T for rows in (z, z0))
            found["same_best_text"] = (now.argmax(dim=1) == before.argmax(dim=1)).float().mean()
            if self.owner is not None:
                found["text_hit@1"] = (now.argmax(dim=0) == self.owner.to(z.device)).float().mean()
        return dict(zip(found, torch.stack([*found.values()]).tolist(), strict=True))


class KernelAlignmentLoop(ImageLoop):
    """Trains an image tower.

    Attributes:
        history: a line every `check_every` steps and at the end: `step`, `epoch`, `learning_rate`, `parameter` (the
            student kernel's offset or sigma), means of `loss`, `align`, `reg` and `nearest` (`nearest_pairs_error`)
            since the last line, and what `HeldOut.look` gives.
    """

    shown: ClassVar[tuple[str, ...]] = ("align", "reg")
    shown_of_lines: ClassVar[dict[str, str]] = {"same_best_text": "same texts"}

    def __init__(
        self,
        encoder: Encoder,
        files: Sequence[Path],
        originals: Float[np.ndarray, "n dim"],
        teachers: Float[np.ndarray, "n teacher_dim"],
        kernels: tuple[Kernel, Kernel],
        recipe: Recipe,
        held_out: HeldOut,
        accelerator: Accelerator,
    ) -> None:
        """Takes an encoder on the device to train on, in float32; kernels of student and teacher."""
        self.recipe, self.held_out, self.accelerator = recipe, held_out, accelerator
        self.originals, self.teachers = originals, teachers
        self.kernels = kernels
        self.tower = Tower(encoder, recipe)
        groups: list[dict[str, Any]] = [
            {"params": [*self.tower.parameters.values()], "weight_decay": recipe.weight_decay}
        ]
        self.parameter: nn.Parameter | None = None
        if recipe.train_kernel:
            self.parameter = nn.Parameter(torch.tensor(_value_of(kernels[0]), device=encoder.device).log())
            groups.append({"params": [self.parameter], "weight_decay": 0.0})
        optimizer = torch.optim.AdamW(groups, lr=recipe.highest_rate)
        processes = accelerator.num_processes
        size = min(recipe.batch_size, len(files)) // processes * processes
        if size < 2 or size < processes:
            raise InputError(
                f"{processes} processes share batches of {min(recipe.batch_size, len(files))} images; give fewer "
                "processes, or a larger batch_size"
            )
        steps = recipe.steps_over(len(files), size)
        super().__init__(
            encoder, files, optimizer, batch_size=size, steps=steps, seed=recipe.seed,
            rank=accelerator.process_index, processes=processes,
        )  # fmt: skip
        self.every = recipe.check_every or max(1, -(-self.steps // _LINES))

    def weights(self) -> dict[str, Tensor]:
        """Of the tower, and of the kernel where it is trained."""
        own = {} if self.parameter is None else {"kernel": self.parameter.detach()}
        return {**{f"tower.{name}": weight for name, weight in self.tower.weights().items()}, **own}

    def student_kernel(self) -> Kernel:
        """With the parameter as it is now, in the graph."""
        kernel = self.kernels[0]
        if self.parameter is None:
            return kernel
        value = float(self.parameter.detach().exp())
        if not 0 < value < math.inf:
            raise NonFiniteLossError(
                f"the kernel's parameter after {self.step} steps is {value} (kernel_learning_rate "
                f"{self.recipe.kernel_rate:g}); lower that rate"
            )
        if isinstance(kernel, GaussianKernel):
            return GaussianKernel(self.parameter.exp())
        assert isinstance(kernel, PolynomialKernel)
        return PolynomialKernel(self.parameter.exp(), degree=kernel.degree)

    def terms(self, images: list[int], pixels: Float[Tensor, "batch 3 height width"]) -> dict[str, Float[Tensor, ""]]:
        """The loss over the batch of all processes."""
        with self.accelerator.autocast():
            z = self.encoder.image_features(pixels)
        z = self._gathered(z.float())
        if self.processes > 1:
            first = self.step * self.batch_size
            images = [self._image_of(sample) for sample in range(first, first + self.batch_size)]
        z0, t = (torch.from_numpy(rows[images]).to(z) for rows in (self.originals, self.teachers))
        loss = kernel_alignment_loss(
            z, z0, t, self.student_kernel(), self.kernels[1],
            weight=self.recipe.weight, reg_weight=self.recipe.reg_weight,
        )  # fmt: skip
        nearest = nearest_pairs_error(loss.student.detach(), loss.teacher)
        return {"loss": loss.total, "align": loss.align, "reg": loss.reg, "nearest": nearest}

    def _gathered(self, z: Float[Tensor, "part dim"]) -> Float[Tensor, "batch dim"]:
        """Features of all processes, in their order, in the graph of each."""
        if self.processes == 1:
            return z
        from torch.distributed.nn.functional import all_gather

        return torch.cat(all_gather(z))

    def learning_rates(self) -> list[float]:
        """Of tower and kernel."""
        factor = self.recipe.factor(self.step, self.steps)
        rates = [self.recipe.highest_rate, self.recipe.kernel_rate]
        return [factor * rate for rate in rates[: len(self.optimizer.param_groups)]]

    def ends_line(self) -> bool:
        """Every so many steps."""
        return self.step % self.every == 0

    def line(self, means: dict[str, float]) -> dict[str, Any]:
        """Where the run is, its means, and a look at held-out images."""
        with self.accelerator.autocast():
            found = self.held_out.look(self.encoder, self.student_kernel(), self.kernels[1])
        return {
            "step": self.step,
            "epoch": self._epoch_of(self.step - 1) + 1,
            "learning_rate": self.recipe.highest_rate * self.recipe.factor(self.step - 1, self.steps),
            "parameter": _value_of(self.student_kernel()),
            **means,
            **found,
        }


def _value_of(kernel: Kernel) -> float | None:
    if isinstance(kernel, CosineKernel):
        return None
    value = kernel.sigma if isinstance(kernel, GaussianKernel) else kernel.offset
    return float(torch.as_tensor(value).detach())
