"""The loop: a timm model, a rotation and a classifier, with checkpoints that a run goes on from bit for bit."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..encoders.compatible import CompatibleEncoder
from ..errors import InputError, NonFiniteLossError, UnreadableImageError, reason_of
from ..files import save_tensors, whole_file
from ..orthogonal import OrthogonalLinear
from ..orthogonal_compatibility import OCALoss, oca_loss
from ..prefetch import prefetch
from ..progress import progress_bar
from .recipe import Recipe

__all__ = ["FineTuning"]

SECONDS_BETWEEN_CHECKPOINTS = 60.0
_SHARE = 10  # a checkpoint waits until training has taken so many times as long as writing the last one
_ORDER, _FLIP, _MODEL = 0, 1, 2  # purposes of random numbers


class FineTuning:
    """One run: `run` trains `encoder.model` in place and leaves `history`.

    Sample n of the run is image `order[n mod images]` of epoch n // images; what is random about it follows from the
    seed and n. Batches are all full and may reach into the next epoch.

    Attributes:
        history: one line an epoch: `epoch`, from 1, `learning_rate`, and the means over its batches of `loss`, `ce`,
            `bct` and `cos`.
        step: optimiser steps done.
        steps: in all.
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
        self.encoder, self.files, self.recipe = encoder, files, recipe
        self.labels = torch.from_numpy(np.asarray(labels, np.int64))
        self.prototypes = prototypes.to(encoder.device)
        self.batch_size = min(recipe.batch_size, len(files))
        self.steps = max(1, round(recipe.epochs * len(files) / self.batch_size))
        self.step = 0
        self.history: list[dict[str, float]] = []
        self._epoch_terms: list[list[float]] = []
        self._order: tuple[int, Int[np.ndarray, " n"]] = (-1, np.zeros(0, np.int64))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.layer = OrthogonalLinear(encoder.dim, orthogonal_map=recipe.orthogonal_map).to(encoder.device)
            self.classifier = nn.Linear(encoder.dim, len(prototypes), bias=False).to(encoder.device)
        free = [*encoder.model.parameters(), *self.classifier.parameters()]
        self.optimizer = torch.optim.Adam(
            # Decay would pull the rotation to the base it happened to start from (and undo Householder's diagonal).
            [
                {"params": free, "weight_decay": recipe.weight_decay},
                {"params": list(self.layer.parameters()), "weight_decay": 0.0},
            ],
            lr=recipe.learning_rate,
        )

    def run(self, checkpoint: Path, about: str, *, workers: int | None = None, progress: bool = False) -> None:
        """Train from the checkpoint, if there is one, to the end.

        Args:
            checkpoint: a file; written at the end of each epoch and once a minute, the less often the longer it takes.
            about: what the run is, for those who find the checkpoint.
            workers: decoding threads.
            progress: show a bar.

        Raises:
            InputError: the checkpoint or an image cannot be read any more.
            NonFiniteLossError: the loss or its gradient is not finite; the step is named.
        """
        if checkpoint.is_file():
            self.load(checkpoint)
        self.encoder.model.train()
        size, first = self.batch_size, self.step * self.batch_size
        samples = ((sample, self._image_of(sample)) for sample in range(first, self.steps * size))
        found = prefetch(samples, self._load, ahead=3 * size, workers=workers)
        bar = progress_bar("fine-tuning", self.steps * size, initial=first, enabled=progress, epoch="-", loss="-")
        saved, cost = time.monotonic(), 0.0
        with contextlib.closing(cast("Any", found)), bar as advance:
            for images, pixels in self._batches(found):
                values = self._update(images, pixels)
                ended = self._count(values)
                advance(size, epoch=str(self._epoch_of(self.step - 1) + 1), loss=f"{values[0]:.3f}")
                since = time.monotonic() - saved
                due = (ended or since > SECONDS_BETWEEN_CHECKPOINTS) and since > _SHARE * cost
                if due or self.step == self.steps:
                    saved = time.monotonic()
                    self.save(checkpoint, about)
                    cost, saved = time.monotonic() - saved, time.monotonic()
        self.encoder.model.eval()

    def save(self, checkpoint: Path, about: str) -> None:
        """Write all that the rest of the run depends on, whole or not at all."""
        state = {"step": self.step, "history": self.history, "epoch_terms": self._epoch_terms, "about": about}
        with whole_file(checkpoint) as path:
            save_tensors(self._tensors(), path, {"state": json.dumps(state)})

    def load(self, checkpoint: Path) -> None:
        """Become what `save` saw.

        Raises:
            InputError: it is damaged, or of another model.
        """
        try:
            with safe_open(checkpoint, "pt") as file:
                state = json.loads(file.metadata()["state"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            parts: dict[str, dict[str, Tensor]] = {part: {} for part in ("model", "layer", "classifier", "adam")}
            for name, tensor in tensors.items():
                part, _, rest = name.partition(".")
                parts[part][rest] = tensor
            self.encoder.model.load_state_dict(parts["model"])
            self.layer.load_state_dict(parts["layer"])
            self.classifier.load_state_dict(parts["classifier"])
            moments: dict[int, dict[str, Tensor]] = {}
            for name, tensor in parts["adam"].items():
                number, _, moment = name.partition(".")
                moments.setdefault(int(number), {})[moment] = tensor
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
            self.step, self.history, self._epoch_terms = state["step"], state["history"], state["epoch_terms"]
        except (OSError, SafetensorError, RuntimeError, KeyError, ValueError, TypeError) as error:
            raise InputError(
                f"checkpoint {str(checkpoint)!r} cannot be read ({reason_of(error)}); delete it to begin afresh"
            ) from None

    def _tensors(self) -> dict[str, Tensor]:
        parts = {"model": self.encoder.model, "layer": self.layer, "classifier": self.classifier}
        tensors = {
            f"{part}.{name}": value for part, module in parts.items() for name, value in module.state_dict().items()
        }
        for number, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{number}.{name}": value for name, value in moments.items()}
        return tensors

    def _epoch_of(self, step: int) -> int:
        return step * self.batch_size // len(self.files)

    def _image_of(self, sample: int) -> int:
        epoch, place = divmod(sample, len(self.files))
        if self._order[0] != epoch:
            order = np.random.default_rng((self.recipe.seed, _ORDER, epoch)).permutation(len(self.files))
            self._order = (epoch, order)
        return int(self._order[1][place])

    def _load(self, sample: tuple[int, int]) -> Float[Tensor, "3 height width"]:
        """Runs in a thread."""
        number, image = sample
        pixels = self.encoder.load_image(self.files[image])[1]
        if self.recipe.flip and np.random.default_rng((self.recipe.seed, _FLIP, number)).random() < 0.5:
            pixels = pixels.flip(-1)
        return pixels

    def _batches(
        self, found: Iterator[tuple[tuple[int, int], Tensor | UnreadableImageError]]
    ) -> Iterator[tuple[list[int], Float[Tensor, "batch 3 height width"]]]:
        images: list[int] = []
        pixels: list[Tensor] = []
        for (_, image), loaded in found:
            if isinstance(loaded, UnreadableImageError):
                raise InputError(f"{loaded}, though it could be read before; run again when nothing writes there")
            images.append(image)
            pixels.append(loaded)
            if len(images) == self.batch_size:
                yield images, torch.stack(pixels)
                images, pixels = [], []

    def _update(self, images: list[int], pixels: Float[Tensor, "batch 3 height width"]) -> list[float]:
        """One step of the optimiser; the loss and its terms before it."""
        device = self.encoder.device
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate_in(self._epoch_of(self.step))
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            # For what is random inside a model, such as dropped paths.
            torch.manual_seed(int(np.random.SeedSequence((self.recipe.seed, _MODEL, self.step)).generate_state(1)[0]))
            loss = self._loss(self.encoder.image_features(pixels.to(device)), self.labels[images].to(device))
        values = torch.stack(loss).tolist()
        if not math.isfinite(values[0]):
            raise self._not_finite(f"the loss of step {self.step} is {values[0]}")
        self.optimizer.zero_grad(set_to_none=True)
        loss.total.backward()
        trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        if not bool(nn.utils.clip_grad_norm_(trained, math.inf).isfinite()):  # clips nothing, and gives the norm
            raise self._not_finite(f"the gradient of step {self.step} is not finite")
        self.optimizer.step()
        return values

    def _loss(self, features: Float[Tensor, "batch dim"], labels: Int[Tensor, " batch"]) -> OCALoss:
        return oca_loss(
            features,
            labels,
            self.prototypes,
            self.layer,
            self.classifier.weight,
            label_smoothing=self.recipe.label_smoothing,
            weights=self.recipe.weights,
        )

    def _not_finite(self, what: str) -> NonFiniteLossError:
        return NonFiniteLossError(f"{what} (learning_rate {self.recipe.learning_rate:g}); lower the learning rate")

    def _count(self, values: list[float]) -> bool:
        """Note what a step gave; True at the end of an epoch."""
        epoch = self._epoch_of(self.step)
        self.step += 1
        self._epoch_terms.append(values)
        if self.step < self.steps and self._epoch_of(self.step) == epoch:
            return False
        means = np.mean(self._epoch_terms, axis=0).tolist()
        line = {"epoch": epoch + 1, "learning_rate": self.recipe.learning_rate_in(epoch)}
        self.history.append({**line, **dict(zip(("loss", *OCALoss._fields[1:]), means, strict=True))})
        self._epoch_terms = []
        return True
