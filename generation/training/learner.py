"""What learns: a network, the part of it that is trained, optimiser, schedule and average, stepped and saved as one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .adaptation import Adaptation, MovingAverage
from .configuration import RunConfig
from .feed import TrainingBatch
from .hardware import is_sharded, make_optimizer, make_schedule
from .monitor import check_finite, mean_of
from .randomness import stream

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Learner", "LossFunction"]

LossFunction = Callable[[Any], tuple[Tensor, dict[str, Tensor]]]


class Learner:
    """All tensors that change while training.

    Attributes:
        network: the denoiser, as the processes that train it together need it wrapped.
        adaptation: what of it is trained.
        optimizer: its optimiser.
        updates: optimiser steps taken since the run began.
    """

    def __init__(
        self,
        config: RunConfig,
        accelerator: Accelerator,
        adaptation: Adaptation,
        *,
        total_updates: int,
        wrapped: bool = True,
    ) -> None:
        """Take what is to be trained.

        Args:
            config: all settings.
            accelerator: accelerate's handle on devices and processes.
            adaptation: what is trained.
            total_updates: optimiser steps of the whole run, by which the learning rate is scheduled.
            wrapped: the network is called through `network`, whose wrapper averages gradients over processes. Without
                it, as where a pipeline calls the network itself, they are averaged before each optimiser step.
        """
        self._config, self._accelerator, self.adaptation = config, accelerator, adaptation
        optimizer = make_optimizer(config, adaptation.parameters)
        self._schedule = make_schedule(config, optimizer, total_updates)
        self._divided = 1
        if accelerator.distributed_type.name == "DEEPSPEED":
            # It divides each loss by this number, whichever parts come; where one optimiser step ends is said to it.
            self._divided = accelerator.gradient_accumulation_steps = config.accumulation
            accelerator.state.deepspeed_plugin.deepspeed_config |= {
                "train_micro_batch_size_per_gpu": config.batch_size,
                "gradient_accumulation_steps": config.accumulation,
                "gradient_clipping": config.max_grad_norm,
            }
        self._averages_itself = not wrapped and accelerator.num_processes > 1
        if wrapped:
            network, self.optimizer = accelerator.prepare(adaptation.network, optimizer)
        else:  # precision only, and in place
            network = accelerator.prepare_model(adaptation.network, evaluation_mode=True)
            self.optimizer = accelerator.prepare(optimizer)
        self.network: nn.Module = network
        self._trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self._average = None
        if config.ema_decay is not None:
            self._average = MovingAverage(adaptation.parameters, config.ema_decay)
        self.updates = 0

    def reference(self) -> contextlib.AbstractContextManager[nn.Module]:
        """The network as it was before training, without gradient; for a LoRA, itself with the adapters off."""
        return self.adaptation.reference()

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """The moving average in the place of the weights, where one is kept."""
        return self._average.applied() if self._average else contextlib.nullcontext()

    def step(self, batches: Sequence[TrainingBatch], loss: LossFunction) -> dict[str, float]:
        """One optimiser step on the mean of the batches' losses; mean values over all samples and processes.

        Args:
            batches: as many as wanted, but on all processes as many.
            loss: of one batch: a scalar, and values with one entry per sample.

        Raises:
            NonFiniteLossError: before anything was updated.
        """
        from accelerate.utils import gather_object

        accelerator = self._accelerator
        parts: list[dict[str, Tensor]] = []
        for place, batch in enumerate(batches):
            last = accelerator.sync_gradients = place + 1 == len(batches)
            alone = contextlib.nullcontext() if last or self._averages_itself else accelerator.no_sync(self.network)
            with alone, self._dropout_stream(place):
                value, sample_values = loss(batch)
                parts.append({"loss": value.detach()[None], **sample_values})
                accelerator.backward(value * self._divided / len(batches))
        if self._averages_itself:
            self._average_gradients()
        norm = accelerator.clip_grad_norm_(self._trained, self._config.max_grad_norm)
        means = mean_of(parts)
        if hasattr(norm, "full_tensor"):  # FSDP 2 gives a DTensor, which mixes with no other
            norm = norm.full_tensor()
        means["grad_norm"] = torch.as_tensor(norm if norm is not None else 0.0, device=means["loss"].device)
        values = self._gathered(means)
        scaled = accelerator.scaler is not None  # loss scaling skips a step with infinite gradients by itself
        but = ("grad_norm",) if scaled else ()
        check_finite(self.updates + 1, values, parts, batches, but=but, gather=gather_object)
        values["learning_rate"] = self._schedule.get_last_lr()[0]
        self.optimizer.step()
        self._schedule.step()
        self.optimizer.zero_grad()
        if self._average is not None:
            self._average.step()
        self.updates += 1
        return values

    def save(self, folder: Path) -> None:
        """All of it, for `load`; every process calls this."""
        main = self._accelerator.is_main_process
        if is_sharded(self._accelerator):
            self._accelerator.save_state(str(folder / "sharded"))
        elif main:
            self.adaptation.save(folder)
            if self._average is not None:
                with self._average.applied():
                    self.adaptation.save(folder / "averaged")
        if main:
            states = {name: part.state_dict() for name, part in self._stateful().items()}
            # Python's file mostly says why it cannot be written; given a path, torch says only where it stopped
            with (folder / "optimizer.pt").open("wb") as file:
                torch.save({"updates": self.updates, **states}, file)

    def load(self, folder: Path) -> None:
        """What `save` wrote, bit for bit."""
        if is_sharded(self._accelerator):
            self._accelerator.load_state(str(folder / "sharded"))
        else:
            self.adaptation.load(folder)
        # weights_only: tensors and plain containers, no code
        states = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        for name, part in self._stateful().items():
            part.load_state_dict(states[name])
        self.updates = states["updates"]

    def export(self, folder: Path, notes: Mapping[str, str]) -> list[Path]:
        """What others load, the average where one is kept; every process calls this, the main one writes."""
        state = self._accelerator.get_state_dict(self.network) if is_sharded(self._accelerator) else None
        if not self._accelerator.is_main_process:
            return []
        folder.mkdir(parents=True, exist_ok=True)
        with self.averaged():
            return self.adaptation.export(folder, notes, state)

    def _average_gradients(self) -> None:
        """Over processes, in one transfer; a process whose batches did not reach a weight counts as zero."""
        for parameter in self._trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in self._trained if parameter.grad is not None]
        means = self._accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
        for gradient, mean in zip(gradients, means.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def _stateful(self) -> dict[str, Any]:
        parts = {"schedule": self._schedule, "average": self._average}
        if not is_sharded(self._accelerator):  # accelerate saves its own, not the schedule
            parts |= {"optimizer": self.optimizer, "scaler": self._accelerator.scaler}
        return {name: part for name, part in parts.items() if part is not None}

    def _gathered(self, means: dict[str, Tensor]) -> dict[str, float]:
        """One transfer from the device, and one mean over processes, for all values."""
        dtype = torch.float32 if self._accelerator.device.type == "mps" else torch.float64
        stacked = torch.stack([value.to(dtype) for value in means.values()])
        return dict(zip(means, self._accelerator.reduce(stacked, "mean").tolist(), strict=True))

    @contextlib.contextmanager
    def _dropout_stream(self, place: int) -> Iterator[None]:
        """LoRA dropout draws from torch's global state: give it one that follows from the step, and restore it."""
        if not self._config.lora_dropout:
            yield
            return
        rank, device = self._accelerator.process_index, self._accelerator.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(stream(self._config.seed, "lora dropout", self.updates, place, rank).initial_seed())
            yield
