"""The one shell around every training objective: data -> network -> loss -> optimiser, kept whole and resumable.

A method is a config and a trainer with a loss; this is a complete one:

    class ToyTrainer(Trainer):
        config_class = TrainingConfig

        def loss(self, batch):
            mse_w, mse_l = pair_errors(self.denoiser.predict(batch), self.denoiser.target(batch))
            return (mse_w - mse_l).mean(), {"mse_w": mse_w, "mse_l": mse_l}
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmalign.encoders.stream import decode_ahead
from mmalign.errors import InputError, UnreadableImageError
from mmalign.progress import progress_bar

from ..pipelines import pipeline_family, quiet_diffusers
from .adaptation import MovingAverage, adapt
from .configuration import TrainingConfig, dry_run_of
from .curves import draw_curves
from .denoiser import Batch, Denoiser
from .hardware import (
    is_sharded,
    limits_told,
    make_accelerator,
    make_optimizer,
    make_schedule,
    peak_memory,
    training_dtype,
)
from .interruption import Interruption
from .monitor import Probe, check_finite, mean_of
from .preparation import Prepared, prepare
from .randomness import BucketedBatches, stream
from .run_folder import Checkpoint, RunFolder
from .training_set import EncodedSet

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from ..rewards.reward import AnyReward

__all__ = ["Trainer", "TrainingReport"]


@dataclass
class TrainingReport:
    """How a run went: its folder, the last step, what was exported, the last values, warnings, rows left out."""

    output: Path
    step: int
    resumed_from: int | None
    exported: list[Path]
    values: dict[str, float]
    warnings: list[str] = field(default_factory=list)
    left_out: int = 0


class Trainer(ABC):
    """Trains the denoiser of a pipeline; `train()` runs, resumes and exports.

    Attributes:
        config_class: the dataclass of the method's settings.
        unit: what a sample is: "pairs", "winners" or "images" (see `samples_of`).
        needs_reference: the loss uses `self.reference()`.
    """

    config_class: ClassVar[type[TrainingConfig]] = TrainingConfig
    unit: ClassVar[str] = "pairs"
    needs_reference: ClassVar[bool] = False

    def __init__(
        self, config: TrainingConfig, *, pipeline: DiffusionPipeline | None = None, reward: AnyReward | None = None
    ) -> None:
        """Nothing is loaded yet.

        Args:
            config: all settings.
            pipeline: trained in place of `config.model`; its denoiser is changed.
            reward: any reward of images and captions, for `min_score` and `min_margin` to filter the rows by.
        """
        self.config = dry_run_of(config) if config.dry_run else config
        self._pipeline = None if config.dry_run else pipeline
        self._reward = reward
        self._folder = RunFolder(self.config.output)
        self._probe = Probe()
        self._warnings: list[str] = []
        self.step = 0

    @abstractmethod
    def loss(self, batch: Batch) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """The scalar to minimise, and values to log, each with one entry per sample.

        `mse_w` (the preferred image's denoising error) and `margin_accuracy` are watched for collapse. Rows whose
        values are not finite are named when training stops.
        """

    def train(self) -> TrainingReport:
        """Check the data, fill the cache, train from the newest checkpoint or from the start, export.

        Ctrl-C or SIGTERM ends the current step, saves a checkpoint and raises KeyboardInterrupt.

        Raises:
            InputError: a setting, the data, a run folder of other settings, a full disk, or too little GPU memory.
            NonFiniteLossError: the loss is not a number any more; rows and step are named.
        """
        if not self.config.data:
            raise InputError("no training data given; set data to a folder, Parquet files or datasets:NAME")
        if self.config.output == Path():
            raise InputError("no run folder given; set output, e.g. runs/first")
        self.step, self._probe, self._warnings = 0, Probe(), []
        self.accelerator = make_accelerator(self.config)
        self._check_sharding()
        with contextlib.ExitStack() as stack:
            stack.enter_context(limits_told(self.config, self.accelerator.device))
            if self.accelerator.is_main_process:
                stack.enter_context(self._folder.locked())
            checkpoint = self._open_folder()
            prepared = self.prepare()
            self.attach(prepared.encoders.pipeline)
            if checkpoint is not None:
                self._resume(checkpoint, prepared)
            start = self.step if checkpoint is not None else None
            if self.accelerator.is_main_process:
                self._folder.begin(self.config, self.step)
            values = self._run(prepared)
            exported = self._export(self.config.output / "export")
        report = TrainingReport(
            self.config.output, self.step, start, exported, values, self._warnings, prepared.left_out
        )
        self.accelerator.end_training()
        return report

    def prepare(self) -> Prepared:
        """Checked and encoded data with the pipeline; a method that trains on a second set adds it here."""
        return prepare(self.config, self.accelerator, self._pipeline, self.unit, self._reward)

    def attach(self, pipeline: DiffusionPipeline) -> None:
        """Make a pipeline's denoiser trainable on this trainer's device; `update` works from here on."""
        if not hasattr(self, "accelerator"):
            self.accelerator = make_accelerator(self.config)
        device = self.accelerator.device
        full = self.config.adaptation == "full"
        dtype = torch.float32 if full else training_dtype(self.config, device)
        with quiet_diffusers():
            network = pipeline.unet.to(device, dtype)
        network.train()
        if self.config.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        family = pipeline_family(pipeline)
        self._adaptation = adapt(network, self.config, family, reference=self.needs_reference)
        optimizer = make_optimizer(self.config, self._adaptation.parameters)
        self._schedule = make_schedule(self.config, optimizer)
        if self.accelerator.distributed_type.name == "DEEPSPEED":
            plugin = self.accelerator.state.deepspeed_plugin
            plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = self.config.batch_size
            plugin.deepspeed_config["gradient_clipping"] = self.config.max_grad_norm
        wrapped, self.optimizer = self.accelerator.prepare(network, optimizer)
        self.network: nn.Module = wrapped
        self._trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
        self.denoiser = Denoiser(wrapped, pipeline.scheduler.config)
        self._average = None
        if self.config.ema_decay is not None:
            self._average = MovingAverage(self._adaptation.parameters, self.config.ema_decay)

    def reference(self) -> contextlib.AbstractContextManager[nn.Module]:
        """The network as it was before training, without gradient; for a LoRA, itself with the adapters off."""
        return self._adaptation.reference()

    def update(self, batches: Sequence[Batch]) -> dict[str, float]:
        """One optimiser step over one batch per accumulation step; mean values over all samples and processes.

        Raises:
            NonFiniteLossError: before anything was updated.
        """
        from accelerate.utils import gather_object

        parts: list[dict[str, Tensor]] = []
        for batch in batches:
            with self.accelerator.accumulate(self.network), self._dropout_stream(batch, len(parts)):
                loss, sample_values = self.loss(batch)
                parts.append({"loss": loss.detach()[None], **sample_values})
                self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(self._trained, self.config.max_grad_norm)
        means = mean_of(parts)
        if hasattr(norm, "full_tensor"):  # FSDP 2 gives a DTensor, which mixes with no other
            norm = norm.full_tensor()
        means["grad_norm"] = torch.as_tensor(norm if norm is not None else 0.0, device=means["loss"].device)
        values = self._gathered(means)
        scaled = self.accelerator.scaler is not None  # loss scaling skips a step with infinite gradients by itself
        but = ("grad_norm",) if scaled else ()
        check_finite(self.step + 1, values, parts, batches, but=but, gather=gather_object)
        values["learning_rate"] = self._schedule.get_last_lr()[0]
        self.optimizer.step()
        self._schedule.step()
        self.optimizer.zero_grad()
        if self._average is not None:
            self._average.step()
        return values

    def batches(self, data: EncodedSet, start: int) -> Iterator[list[Batch]]:
        """For each step from `start` on, this process's batches, loaded ahead and already on the device."""
        config, accelerator = self.config, self.accelerator
        order = BucketedBatches([s.placement.target for s in data.samples], config.batch_size, config.seed)
        device = accelerator.device
        loaded: Iterator[Batch]

        def jobs() -> Iterator[tuple[list[int], range]]:
            for step in range(start, config.steps):
                for micro in range(config.accumulation):
                    place = (step * config.accumulation + micro) * accelerator.num_processes
                    number = place + accelerator.process_index
                    yield order[number], range(number * config.batch_size, (number + 1) * config.batch_size)

        def load(job: tuple[list[int], range]) -> tuple[Batch, None]:
            return self.assemble(data, *job), None

        if config.cache:
            ahead = config.accumulation + 2
            loaded = map(_batch_of, decode_ahead(jobs(), load, ahead=ahead, workers=config.workers))
        else:  # the VAE runs on the device, between steps
            loaded = (self.assemble(data, *job) for job in jobs())
        while chunk := [batch.to(device) for batch in itertools.islice(loaded, config.accumulation)]:
            yield chunk

    def assemble(self, data: EncodedSet, indices: Sequence[int], ordinals: Sequence[int]) -> Batch:
        """A batch of the given samples; one of a second set beside it where the method has one."""
        return data.batch(indices, ordinals)

    def _check_sharding(self) -> None:
        config = self.config
        wanted = {"adaptation lora": config.adaptation == "lora", "ema_decay": config.ema_decay is not None}
        wanted["validation_prompts"] = bool(config.validation_prompts)
        cannot = [name for name, present in wanted.items() if present]
        if cannot and is_sharded(self.accelerator):
            raise InputError(
                f"{' and '.join(cannot)} cannot be had under FSDP or DeepSpeed, where no process has the whole model; "
                "launch with scripts/accelerate/multi_gpu.yaml (a LoRA fits every card)"
            )

    def _open_folder(self) -> Checkpoint | None:
        if self.accelerator.is_main_process:
            if self.config.dry_run:  # begins afresh each time
                shutil.rmtree(self.config.output / "checkpoints", ignore_errors=True)
            self._folder.open(self.config)
        self.accelerator.wait_for_everyone()
        checkpoints = self._folder.checkpoints()
        return checkpoints[-1] if checkpoints else None

    def _run(self, prepared: Prepared) -> dict[str, float]:
        config, data = self.config, prepared.data
        self._start_loggers()
        if self.step == 0:
            self._render(prepared)
            self._look(data)
        values: dict[str, float] = {}
        shown = config.progress and self.accelerator.is_main_process and self.step < config.steps
        fields = dict.fromkeys(("loss", "margin", "drift", "memory"), "-")
        bar = progress_bar(config.method, config.steps, unit="steps", initial=self.step, enabled=shown, **fields)
        with bar as advance, Interruption() as interruption:
            began = time.perf_counter()
            for chunk in self.batches(data, self.step):
                values = self.update(chunk)
                self.step += 1
                now = time.perf_counter()
                values |= {"step_seconds": now - began, "peak_memory_gb": peak_memory(self.accelerator.device)}
                last = self.step == config.steps
                if self.step % config.probe_every == 0 or last:
                    values |= self._look(data)
                self._log(values)
                advance(**_shown(values))
                if config.validation_prompts and (self.step % config.validate_every == 0 or last):
                    self._render(prepared)
                stop = self._any_process(interruption.requested)
                if self.step % config.checkpoint_every == 0 or last or stop:
                    self._save(prepared)
                if stop and not last:
                    raise KeyboardInterrupt
                began = time.perf_counter()
        return values

    def _look(self, data: EncodedSet) -> dict[str, float]:
        """The probe: fixed samples, noise, and timesteps spread evenly over the schedule."""
        size = min(self.config.probe_size, len(data.samples))
        if not size:
            return {}
        order = torch.randperm(len(data.samples), generator=stream(self.config.seed, "probe")).tolist()[:size]
        total = self.denoiser.num_train_timesteps
        parts = []
        self.network.eval()
        with torch.no_grad():
            for place, index in enumerate(order):
                batch = data.batch([index], [-1 - place])
                time_ = torch.full_like(batch.timesteps, int((place + 0.5) / size * total))
                parts.append(self.loss(replace(batch, timesteps=time_).to(self.accelerator.device))[1])
        self.network.train()
        values, warnings = self._probe.read({name: float(value) for name, value in mean_of(parts).items()})
        for warning in warnings:
            self._warn(warning)
        if self.step == 0 and self.accelerator.is_main_process:
            self._folder.log({"step": 0, **values})
        return values

    def _warn(self, warning: str) -> None:
        self._warnings.append(f"step {self.step}: {warning}")
        if self.accelerator.is_main_process:
            print(f"warning: {self._warnings[-1]}", file=sys.stderr)

    def _gathered(self, means: dict[str, Tensor]) -> dict[str, float]:
        """One transfer from the device, and one mean over processes, for all values."""
        dtype = torch.float32 if self.accelerator.device.type == "mps" else torch.float64
        stacked = torch.stack([value.to(dtype) for value in means.values()])
        return dict(zip(means, self.accelerator.reduce(stacked, "mean").tolist(), strict=True))

    def _any_process(self, flag: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device), "sum") > 0)

    @contextlib.contextmanager
    def _dropout_stream(self, batch: Batch, micro: int) -> Iterator[None]:
        """LoRA dropout draws from torch's global state: give it one that follows from the step, and restore it."""
        if not self.config.lora_dropout:
            yield
            return
        rank, device = self.accelerator.process_index, self.accelerator.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(stream(self.config.seed, "lora dropout", self.step, micro, rank).initial_seed())
            yield

    def _render(self, prepared: Prepared) -> None:
        if prepared.validation is None or not self.accelerator.is_main_process:
            return
        path = self.config.output / "samples" / f"step-{self.step:06d}.png"
        with self._average.applied() if self._average else contextlib.nullcontext():
            prepared.validation.render(self._adaptation.network, path, f"step {self.step}")

    def _save(self, prepared: Prepared) -> None:
        main = self.accelerator.is_main_process
        publish = self._folder.checkpoint(self.step, self.config.keep_checkpoints) if main else None
        with publish or contextlib.nullcontext(self._folder.unfinished(self.step)) as folder:
            self.accelerator.wait_for_everyone()
            if is_sharded(self.accelerator):
                self.accelerator.save_state(str(folder / "sharded"))
            elif main:
                self._adaptation.save(folder)
                if self._average is not None:
                    with self._average.applied():
                        self._adaptation.export(folder / "averaged", {}, None)
            if main:
                torch.save(
                    {name: part.state_dict() for name, part in self._stateful().items()}, folder / "optimizer.pt"
                )
                about = {
                    "step": self.step,
                    "data": prepared.fingerprint,
                    "processes": self.accelerator.num_processes,
                    "probe": self._probe.to_dict(),
                }
                (folder / "trainer.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
            self.accelerator.wait_for_everyone()
        if main:
            draw_curves(self._folder.metrics, self.config.output / "curves.png")
        self.accelerator.wait_for_everyone()

    def _resume(self, checkpoint: Checkpoint, prepared: Prepared) -> None:
        with checkpoint.read() as about:
            if about["data"] != prepared.fingerprint:
                raise InputError(
                    f"the training data are not those that {str(self.config.output)!r} was begun with (rows, captions "
                    "or images changed); restore them to resume, or choose another output"
                )
            if is_sharded(self.accelerator):
                self.accelerator.load_state(str(checkpoint.path / "sharded"))
            else:
                self._adaptation.load(checkpoint.path)
            # weights_only: tensors and plain containers, no code
            states = torch.load(checkpoint.path / "optimizer.pt", map_location="cpu", weights_only=True)
            for name, part in self._stateful().items():
                part.load_state_dict(states[name])
            self._probe = Probe(**about["probe"])
            self.step = about["step"]
            before, now = about["processes"], self.accelerator.num_processes
        if before != now:
            self._warn(f"begun with {before} processes and resumed with {now}: batches differ from an undisturbed run")

    def _stateful(self) -> dict[str, Any]:
        parts = {"schedule": self._schedule, "average": self._average}
        if not is_sharded(self.accelerator):  # accelerate saves its own, not the schedule
            parts |= {"optimizer": self.optimizer, "scaler": self.accelerator.scaler}
        return {name: part for name, part in parts.items() if part is not None}

    def _export(self, folder: Path) -> list[Path]:
        config = self.config
        state = self.accelerator.get_state_dict(self.network) if is_sharded(self.accelerator) else None
        if not self.accelerator.is_main_process:
            return []
        folder.mkdir(parents=True, exist_ok=True)
        notes = {"mmalign_method": config.method, "mmalign_steps": str(self.step), "mmalign_base": config.model}
        with self._average.applied() if self._average else contextlib.nullcontext():
            return self._adaptation.export(folder, notes, state)

    def _start_loggers(self) -> None:
        if self.config.tensorboard or self.config.wandb:
            self.accelerator.init_trackers(self.config.wandb or "tensorboard")

    def _log(self, values: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            self._folder.log({"step": self.step, **values})
        if self.config.tensorboard or self.config.wandb:
            self.accelerator.log(values, step=self.step)


def _batch_of(outcome: tuple[object, tuple[Batch, Tensor | None] | UnreadableImageError]) -> Batch:
    """A loaded batch; a failure is raised here, as leaving it out would shift all that follow."""
    loaded = outcome[1]
    if isinstance(loaded, UnreadableImageError):
        raise loaded
    return loaded[0]


def _shown(values: dict[str, float]) -> dict[str, str]:
    """What the progress bar has room for."""
    shown = {"loss": f"{values['loss']:.4f}", "memory": f"{values['peak_memory_gb']:.1f} GB"}
    if "margin_accuracy" in values:
        shown["margin"] = f"{values['margin_accuracy']:.2f}"
    if "winner_drift" in values:
        shown["drift"] = f"{values['winner_drift']:+.1%}"
    return shown
