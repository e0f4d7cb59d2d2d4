"""The one loop that trains image encoders: files in a seeded order, steps, checkpoints that a run goes on from."""

from __future__ import annotations

import contextlib
import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..encoders import Encoder
from ..errors import InputError, NonFiniteLossError, UnreadableImageError, reason_of
from ..files import save_tensors, whole_file
from ..prefetch import prefetch
from ..progress import progress_bar

__all__ = ["FLIP", "ImageLoop"]

SECONDS_BETWEEN_CHECKPOINTS = 60.0
_SHARE = 10  # a checkpoint waits until training has taken so many times as long as writing the last one
ORDER, FLIP, MODEL = 0, 1, 2  # purposes of random numbers


class ImageLoop(ABC):
    """One run over a list of images: `run` trains in place and leaves `history`.

    Sample n of the run is image `order[n mod images]` of epoch n // images; what is random about it follows from the
    seed and n. Batches are all full and may reach into the next epoch. On a CPU a run that was stopped and goes on ends
    in the same bits as one that was not.

    A subclass says what is trained (`weights`), by what loss (`terms`) and with which learning rates, and where lines
    of the history end.

    Attributes:
        encoder: its `image_features` are trained.
        optimizer: of the Adam family; its groups hold all that is trained.
        history: lines, see the subclass.
        step: optimiser steps done.
        steps: in all.
        rank: number of this process among `processes` that train together; each takes its part of every batch.
    """

    shown: ClassVar[tuple[str, ...]] = ("epoch", "loss")  # in the bar: `epoch`, and of `terms`
    shown_of_lines: ClassVar[dict[str, str]] = {}  # of the last line of `history`, and what the bar calls it

    def __init__(
        self,
        encoder: Encoder,
        files: Sequence[Path],
        optimizer: torch.optim.Optimizer,
        *,
        batch_size: int,
        steps: int,
        seed: int,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        self.encoder, self.files, self.optimizer = encoder, files, optimizer
        self.batch_size, self.steps, self.seed = batch_size, steps, seed
        self.rank, self.processes = rank, processes
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self._line: list[dict[str, float]] = []
        self._orders: dict[int, Int[np.ndarray, " n"]] = {}

    # -- what a method provides ------------------------------------------------------------------------------------

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """By name, the tensors that training changes, as they are (no copies): what a checkpoint holds."""

    @abstractmethod
    def terms(self, images: list[int], pixels: Float[Tensor, "batch 3 height width"]) -> dict[str, Float[Tensor, ""]]:
        """The loss of a batch, first and named `loss`, and what is noted beside it."""

    @abstractmethod
    def learning_rates(self) -> Sequence[float]:
        """One for each group of the optimiser, for the step that comes."""

    @abstractmethod
    def ends_line(self) -> bool:
        """Whether a line of the history ends with the step just done."""

    @abstractmethod
    def line(self, means: dict[str, float]) -> dict[str, Any]:
        """A line of the history from the means of `terms` over its steps."""

    def pixels_of(self, sample: int, image: int) -> Float[Tensor, "3 height width"]:
        """An image as it is trained on; runs in a thread."""
        return self.encoder.load_image(self.files[image])[1]

    # -- what a run does -------------------------------------------------------------------------------------------

    def run(self, checkpoint: Path, about: str, *, workers: int | None = None, progress: bool = False) -> None:
        """Train from the checkpoint, if there is one, to the end.

        Args:
            checkpoint: a file; written where a line of the history ends and once a minute, the less often the longer
                it takes.
            about: what the run is, for those who find the checkpoint.
            workers: decoding threads.
            progress: show a bar.

        Raises:
            InputError: the checkpoint or an image cannot be read any more.
            NonFiniteLossError: the loss or its gradient is not finite; the step is named.
        """
        if checkpoint.is_file():
            self.load(checkpoint)
        try:
            self._run(checkpoint, about, workers, progress)
        except NonFiniteLossError:
            # It would diverge again; and with other settings, which the error advises, nothing could go on from it.
            if self.rank == 0:
                checkpoint.unlink(missing_ok=True)
            raise

    def _run(self, checkpoint: Path, about: str, workers: int | None, progress: bool) -> None:
        size, first = self.batch_size, self.step
        samples = ((n, self._image_of(n)) for step in range(first, self.steps) for n in self._own(step))
        found = prefetch(samples, lambda sample: self.pixels_of(*sample), ahead=3 * size, workers=workers)
        fields = dict.fromkeys([*self.shown_of_lines.values(), *self.shown], "-")
        bar = progress_bar("fine-tuning", self.steps * size, initial=first * size, enabled=progress, **fields)
        saved, cost = time.monotonic(), 0.0
        with contextlib.closing(cast("Any", found)), bar as advance:
            for images, pixels in self._batches(found):
                values = self._update(images, pixels)
                self.step += 1
                self._line.append(values)
                ended = self.step == self.steps or self.ends_line()
                if ended:
                    self._check_weights()
                    self.history.append(self.line(self._means()))
                    self._line = []
                shown = {name: f"{value:.3g}" for name, value in values.items() if name in self.shown}
                if "epoch" in self.shown:
                    shown["epoch"] = str(self._epoch_of(self.step - 1) + 1)
                if self.history:
                    last = self.history[-1]
                    shown |= {told: f"{last[name]:.3f}" for name, told in self.shown_of_lines.items() if name in last}
                advance(size, **shown)
                since = time.monotonic() - saved
                due = (ended or since > SECONDS_BETWEEN_CHECKPOINTS) and since > _SHARE * cost
                if self.rank == 0 and (due or self.step == self.steps):
                    saved = time.monotonic()
                    self.save(checkpoint, about)
                    cost, saved = time.monotonic() - saved, time.monotonic()

    def save(self, checkpoint: Path, about: str) -> None:
        """Write all that the rest of the run depends on, whole or not at all."""
        state = {"step": self.step, "history": self.history, "line": self._line, "about": about}
        tensors = {f"weights.{name}": value for name, value in self.weights().items()}
        for number, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{number}.{name}": value for name, value in moments.items()}
        with whole_file(checkpoint) as path:
            save_tensors(tensors, path, {"state": json.dumps(state)})

    def load(self, checkpoint: Path) -> None:
        """Become what `save` saw.

        Raises:
            InputError: it is damaged, or of another model.
        """
        try:
            with safe_open(checkpoint, "pt") as file:
                state = json.loads(file.metadata()["state"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            moments: dict[int, dict[str, Tensor]] = {}
            found: dict[str, Tensor] = {}
            for name, tensor in tensors.items():
                part, _, rest = name.partition(".")
                if part == "weights":
                    found[rest] = tensor
                else:
                    number, _, moment = rest.partition(".")
                    moments.setdefault(int(number), {})[moment] = tensor
            self._set_weights(found)
            self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
            self.step, self.history, self._line = state["step"], state["history"], state["line"]
        except (OSError, SafetensorError, RuntimeError, KeyError, ValueError, TypeError) as error:
            raise InputError(
                f"checkpoint {str(checkpoint)!r} cannot be read ({reason_of(error)}); delete it to begin afresh"
            ) from None

    @torch.no_grad()
    def _set_weights(self, found: dict[str, Tensor]) -> None:
        ours = self.weights()
        if ours.keys() != found.keys() or any(ours[name].shape != found[name].shape for name in ours):
            raise ValueError("it holds weights of another model")
        for name, tensor in ours.items():
            tensor.copy_(found[name])

    def _epoch_of(self, step: int) -> int:
        return step * self.batch_size // len(self.files)

    def _own(self, step: int) -> range:
        """Samples of a step that this process takes."""
        part = self.batch_size // self.processes
        first = step * self.batch_size + self.rank * part
        return range(first, first + part)

    def _image_of(self, sample: int) -> int:
        epoch, place = divmod(sample, len(self.files))
        if epoch not in self._orders:
            order = np.random.default_rng((self.seed, ORDER, epoch)).permutation(len(self.files))
            # What is loaded ahead may be an epoch further than what is trained on.
            self._orders = {**{known: self._orders[known] for known in [*self._orders][-2:]}, epoch: order}
        return int(self._orders[epoch][place])

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
            if len(images) == self.batch_size // self.processes:
                yield images, torch.stack(pixels)
                images, pixels = [], []

    def _update(self, images: list[int], pixels: Float[Tensor, "batch 3 height width"]) -> dict[str, float]:
        """One step of the optimiser; the loss and its terms before it."""
        device = self.encoder.device
        for group, rate in zip(self.optimizer.param_groups, self.learning_rates(), strict=True):
            group["lr"] = rate
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            # For what is random inside a model, such as dropped paths.
            torch.manual_seed(int(np.random.SeedSequence((self.seed, MODEL, self.step)).generate_state(1)[0]))
            terms = self.terms(images, pixels.to(device))
        values = dict(zip(terms, torch.stack([*terms.values()]).tolist(), strict=True))
        if not math.isfinite(values["loss"]):
            raise self._not_finite(f"the loss of step {self.step} is {values['loss']}")
        self.optimizer.zero_grad(set_to_none=True)
        terms["loss"].backward()
        trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        if self.processes > 1:
            for parameter in trained:
                if parameter.grad is not None:  # of layers that the features do not reach, on every process alike
                    torch.distributed.all_reduce(parameter.grad)
                    parameter.grad /= self.processes
        if not bool(nn.utils.clip_grad_norm_(trained, math.inf).isfinite()):  # clips nothing, and gives the norm
            raise self._not_finite(f"the gradient of step {self.step} is not finite")
        self.optimizer.step()
        return values

    def _check_weights(self) -> None:
        """What the last step made of them shows in no loss yet."""
        for group in self.optimizer.param_groups:
            if not all(bool(parameter.isfinite().all()) for parameter in group["params"]):
                raise self._not_finite(f"weights after step {self.step - 1} are not finite")

    def _not_finite(self, what: str) -> NonFiniteLossError:
        rate = self.optimizer.defaults["lr"]
        return NonFiniteLossError(f"{what} (learning_rate {rate:g}); lower the learning rate")

    def _means(self) -> dict[str, float]:
        return {name: float(np.mean([values[name] for values in self._line])) for name in self._line[0]}
