"""The run around every training method: prepared, stepped, looked at, saved, interrupted, resumed and exported.

A method says what is prepared and what is minimised; one that trains on stored images is a `DenoisingTrainer` with a
loss, and this is a complete one:

    class ToyTrainer(DenoisingTrainer):
        def loss(self, batch):
            mse_w, mse_l = pair_errors(self.denoiser.predict(batch), self.denoiser.target(batch))
            return (mse_w - mse_l).mean(), {"mse_w": mse_w, "mse_l": mse_l}
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmalign.errors import InputError, ModelUnavailableError
from mmalign.progress import progress_bar

from ..pipelines import (
    FAMILIES,
    denoiser_of,
    load_pipeline,
    pipeline_family,
    quiet_diffusers,
    weights_fingerprint,
)
from .adaptation import Adaptation, make_adaptation
from .configuration import RunConfig, dry_run_of, unlike_given
from .curves import draw_curves
from .feed import TrainingData, load_batches
from .hardware import is_sharded, make_accelerator, memory_told, peak_memory, training_dtype
from .interruption import Interruption
from .learner import Learner
from .run_folder import Checkpoint, RunFolder
from .validation import Validation

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers import DiffusionPipeline

__all__ = ["Prepared", "Trainer", "TrainingReport"]

_log = logging.getLogger(__name__)
# Drawing takes half a second, and a checkpoint of a small run less.
_CURVES_SECONDS = 30


@dataclass
class TrainingReport:
    """How a run went: folder, last step, what was exported, last values, warnings, rows left out, the first look.

    `ended` says why, where a run ended before its last step.
    """

    output: Path
    step: int
    resumed_from: int | None
    exported: list[Path]
    values: dict[str, float]
    warnings: list[str] = field(default_factory=list)
    left_out: int = 0
    first_look: dict[str, float] = field(default_factory=dict)
    ended: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON has it: paths as text, and `None` for a value that is no finite number."""
        return {
            **vars(self),
            "output": str(self.output),
            "exported": [str(path) for path in self.exported],
            "values": _finite(self.values),
            "first_look": _finite(self.first_look),
            "warnings": list(self.warnings),
        }


@dataclass
class Prepared:
    """What a run needs: a pipeline, data, pictures to draw while it goes, and how many rows could not be used."""

    pipeline: DiffusionPipeline
    data: TrainingData
    validation: Validation | None = None
    left_out: int = 0


class Trainer(ABC):
    """Trains the denoiser of a pipeline; `train()` runs, resumes and exports.

    A method overrides `prepare` and `loss`, and where it must `adapt` (what is trained), `connect` (what else the
    network is used through), `update` (what a step is), `look` and `judge` (what is watched). What it does in a step
    may depend on `config.seed`, `step` and what the learner holds, and on nothing else that lasts from one step to the
    next: then an interrupted run ends as an undisturbed one.

    Attributes:
        config_class: the dataclass of the method's settings.
        families: of the pipelines that it can train.
        needs_reference: it uses `self.reference()`.
        through_pipeline: a pipeline calls the network, which therefore cannot be sharded over processes.
        shown: fields of the progress bar, each the name of a value and its format.
        panels: of the run's curves, headings with names of values.
        step: steps done.
        first_look: what `look` found before the first step.
        prepared: what `prepare` returned, while a run goes.
        accelerator: accelerate's handle on devices and processes.
        learner: the network and all that changes with it, from `attach` on.
        folder: the run's.
    """

    config_class: ClassVar[type[RunConfig]] = RunConfig
    families: ClassVar[Sequence[str]] = tuple(FAMILIES)
    needs_reference: ClassVar[bool] = False
    through_pipeline: ClassVar[bool] = False
    shown: ClassVar[Mapping[str, tuple[str, str]]] = {
        "loss": ("loss", "{:.4f}"),
        "memory": ("peak_memory_gb", "{:.1f} GB"),
    }
    panels: Mapping[str, tuple[str, ...]] = {"loss": ("loss",), "gradient norm": ("grad_norm",)}
    accelerator: Accelerator
    learner: Learner
    prepared: Prepared

    def __init__(self, config: RunConfig, *, pipeline: DiffusionPipeline | None = None) -> None:
        """Nothing is loaded yet.

        Args:
            config: all settings.
            pipeline: trained in place of `config.model`; its denoiser is changed. In a dry run, a tiny one of its
                family.

        Raises:
            InputError: settings say how to load a model that is given.
        """
        if pipeline is not None and (config.vae or config.variant):
            raise InputError("vae and variant say how to load a model, and a loaded pipeline was given; leave them out")
        self._pipeline, self._about_dry_run = pipeline, list[str]()
        self.config = config
        if config.dry_run:
            family = None if pipeline is None else pipeline_family(pipeline)
            self.config, self._pipeline = dry_run_of(config, family), None
            if pipeline is not None:
                self._about_dry_run.append(f"dry run: {self.config.model} stands in for the pipeline that was given")
            if changed := unlike_given(config, self.config):
                self._about_dry_run.append(f"dry run: {', '.join(changed)}")
        self.folder = RunFolder(self.config.output)
        self._begin()

    @abstractmethod
    def prepare(self) -> Prepared:
        """All that is needed before the first step; every process calls this."""

    @abstractmethod
    def loss(self, batch: Any) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """The scalar to minimise, and values to log, each with one entry per sample.

        Rows whose values are not finite are named when training stops.
        """

    def check_settings(self) -> None:
        """Refuse what cannot work, before anything is loaded or written."""
        if self.config.output == Path():
            raise InputError("no run folder given; set output, e.g. runs/first")

    def adapt(self, network: nn.Module, family: str) -> Adaptation:
        """Make part of the denoiser trainable."""
        return make_adaptation(network, self.config, family, reference=self.needs_reference)

    def connect(self, pipeline: DiffusionPipeline) -> None:  # noqa: B027 (most need none)
        """Called when `learner` has the pipeline's denoiser."""

    def update(self, batches: Sequence[Any]) -> dict[str, float]:
        """One step on `config.accumulation` batches; the values to log."""
        return self.learner.step(batches, self.loss)

    @property
    def total_updates(self) -> int:
        """Optimiser steps of a whole run, by which the learning rate is scheduled."""
        return self.config.steps

    def look(self) -> dict[str, float]:
        """What is watched beside a step's own values, under the names that it is logged by; without gradients."""
        return {}

    def judge(self, start: Mapping[str, float], values: Mapping[str, float]) -> dict[str, str]:
        """Warnings by kind, each of which is given once, from the first look and this one."""
        return {}

    def enough(self) -> str | None:
        """Why to end before the last step, after a look; a function of what has been logged."""
        return None

    def facts(self) -> dict[str, str]:
        """By name, what beside data and weights a run is resumed with only unchanged; as text."""
        return {}

    def reference(self) -> contextlib.AbstractContextManager[nn.Module]:
        """The network as it was before training, without gradient; for a LoRA, itself with the adapters off."""
        return self.learner.reference()

    def train(self) -> TrainingReport:
        """Prepare, train from the newest checkpoint or from the start, export.

        Ctrl-C or SIGTERM ends the current step, saves a checkpoint and raises KeyboardInterrupt.

        Raises:
            InputError: a setting, the data, a run folder of other settings, a full disk, or too little GPU memory.
            NonFiniteLossError: the loss is not a number any more; rows and step are named.
        """
        self.check_settings()
        self._begin()
        self.accelerator = make_accelerator(self.config)
        self._check_sharding()
        with contextlib.ExitStack() as stack:
            stack.enter_context(memory_told(self.config, self.accelerator.device))
            if self.accelerator.is_main_process:
                stack.enter_context(self.folder.locked())
            for line in self._about_dry_run:
                self.warn(line)
            checkpoint = self._open_folder()
            self.prepared = self.prepare()
            self.attach(self.prepared.pipeline)
            if checkpoint is not None:
                self._resume(checkpoint)
            start = self.step if checkpoint is not None else None
            if self.accelerator.is_main_process:
                self.folder.begin(self.config, self.step, base=self._base, base_weights=self._weights)
            values = self._run()
            notes = {"method": self.config.method, "steps": str(self.step)}
            notes |= {"base": self._base, "base_weights": self._weights}
            exported = self.learner.export(self.folder.export, {f"mmalign_{k}": v for k, v in notes.items()})
        left_out = self.prepared.left_out
        self.accelerator.end_training()
        return TrainingReport(
            self.config.output,
            self.step,
            start,
            exported,
            values,
            self._warnings,
            left_out,
            dict(self.first_look),
            self._end,
        )

    def load_pipeline(self) -> DiffusionPipeline:
        """The given pipeline, or `config.model` on the CPU; refused if it is of no family that this method trains."""
        config = self.config
        # float32 until the denoiser is cast: latents and embeddings are made once and should not carry bfloat16's error
        pipeline = self._pipeline or load_pipeline(
            config.model, device="cpu", dtype="float32", vae=config.vae, variant=config.variant
        )
        family = pipeline_family(pipeline)
        if family not in self.families:
            names = {"sdxl": "SDXL", "sd15": "SD 1.5", "sd3": "SD 3", "flux": "FLUX"}
            trained = " and ".join(names[known] for known in self.families)
            raise InputError(f"{self._name_of(pipeline)!r} is a {family} pipeline; this method trains {trained}")
        return pipeline

    def attach(self, pipeline: DiffusionPipeline) -> None:
        """Make a pipeline's denoiser trainable on this trainer's device; `update` works from here on."""
        if not hasattr(self, "accelerator"):
            self.accelerator = make_accelerator(self.config)
        device = self.accelerator.device
        full = self.config.adaptation == "full"
        network = denoiser_of(pipeline)[1]
        # as it was loaded: the same on every device and in every precision of training
        self._base, self._weights = self._name_of(pipeline), weights_fingerprint(network)
        with quiet_diffusers():
            network = network.to(device, torch.float32 if full else training_dtype(self.config, device))
        network.train()
        if self.config.gradient_checkpointing:
            network.enable_gradient_checkpointing()  # type: ignore[operator]
        adaptation = self.adapt(network, pipeline_family(pipeline))
        self.learner = Learner(
            self.config,
            self.accelerator,
            adaptation,
            total_updates=self.total_updates,
            wrapped=not self.through_pipeline,
        )
        self.connect(pipeline)

    def batches(self, data: TrainingData, start: int) -> Iterator[list[Any]]:
        """For each step from `start` on, this process's batches, loaded ahead and already on the device."""
        config, accelerator = self.config, self.accelerator
        micros = range(start * config.accumulation, config.steps * config.accumulation)
        numbers = (micro * accelerator.num_processes + accelerator.process_index for micro in micros)
        loaded = load_batches(data, numbers, ahead=config.accumulation + 2, workers=config.workers)
        while chunk := [batch.to(accelerator.device) for batch in islice(loaded, config.accumulation)]:
            yield chunk

    def warn(self, warning: str) -> None:
        """Put a line into the report, and into the log of `generation.training` at once."""
        self._warnings.append(warning)
        if self.accelerator.is_main_process:
            _log.warning(warning)

    def _begin(self) -> None:
        self.step = 0
        self._end: str | None = None
        self.first_look: dict[str, float] = {}
        self._warned: list[str] = []
        self._warnings: list[str] = []

    def _name_of(self, pipeline: DiffusionPipeline) -> str:
        if self._pipeline is None:
            return self.config.model
        return str(pipeline.config.get("_name_or_path") or type(pipeline).__name__)

    def _check_sharding(self) -> None:
        config = self.config
        wanted = {
            f"adaptation {config.adaptation}": config.adaptation != "full",
            "ema_decay": config.ema_decay is not None,
        }
        wanted["validation_prompts"] = bool(config.validation_prompts)
        wanted[f"method {config.method}"] = self.through_pipeline
        cannot = [name for name, present in wanted.items() if present]
        if cannot and is_sharded(self.accelerator):
            raise InputError(
                f"{' and '.join(cannot)} cannot be had under FSDP or DeepSpeed, where no process has the whole model; "
                "launch with scripts/accelerate/multi_gpu.yaml (a LoRA fits every card)"
            )

    def _open_folder(self) -> Checkpoint | None:
        if self.accelerator.is_main_process:
            self.folder.open(self.config)
        self.accelerator.wait_for_everyone()
        checkpoints = self.folder.checkpoints()
        return checkpoints[-1] if checkpoints else None

    def _run(self) -> dict[str, float]:
        config, main = self.config, self.accelerator.is_main_process
        values: dict[str, float] = {}
        self._start_loggers()
        if self.step == 0:
            self._render()
            if (values := self._look()) and main:
                self.folder.log({"step": 0, **values})
        if self._ended():
            rows = self.folder.logged("step")
            return {name: value for name, value in rows[-1].items() if name != "step"}
        shown = config.progress and main and self.step < config.steps
        fields = dict.fromkeys(self.shown, "-")
        bar = progress_bar(config.method, config.steps, unit="steps", initial=self.step, enabled=shown, **fields)
        with bar as advance, Interruption() as interruption:
            began = drawn = time.perf_counter()
            for chunk in self.batches(self.prepared.data, self.step):
                values = self._updated(chunk)
                self.step += 1
                now = time.perf_counter()
                values |= {"step_seconds": now - began, "peak_memory_gb": peak_memory(self.accelerator.device)}
                last = self.step == config.steps
                looked = self.step % config.probe_every == 0 or last
                if looked:
                    values |= self._look()
                self._log(values)
                ended = looked and not last and self._ended()
                advance(**{k: form.format(values[name]) for k, (name, form) in self.shown.items() if name in values})
                if config.validation_prompts and (self.step % config.validate_every == 0 or last):
                    self._render()
                stop = self._any_process(interruption.requested)
                if self.step % config.checkpoint_every == 0 or last or stop or ended:
                    self._save()
                    if main and (last or stop or ended or time.perf_counter() - drawn > _CURVES_SECONDS):
                        draw_curves(self.folder.metrics, self.folder.curves, self.panels)
                        drawn = time.perf_counter()
                if ended:
                    break
                if stop and not last:
                    raise KeyboardInterrupt
                began = time.perf_counter()
        return values

    def _updated(self, chunk: list[Any]) -> dict[str, float]:
        """A step; where something outside is gone before it changed anything, what was trained so far is saved."""
        before = self.learner.updates
        try:
            return self.update(chunk)
        except ModelUnavailableError:
            saved = [checkpoint.step for checkpoint in self.folder.checkpoints()]
            alone = self.accelerator.num_processes == 1  # saving waits for all processes, and only this one failed
            if alone and self.step and self.step not in saved and self.learner.updates == before:
                self._save()
            raise

    def _look(self) -> dict[str, float]:
        self.learner.network.eval()
        with torch.no_grad():
            values = self.look()
        self.learner.network.train()
        self.first_look = self.first_look or values
        for kind, warning in self.judge(self.first_look, values).items():
            if kind not in self._warned:
                self._warned.append(kind)
                self.warn(f"step {self.step}: {warning}")
        return values

    def _ended(self) -> bool:
        """Whether `enough` says so, in the main process, which has the log."""
        self._end = self.enough() if self.accelerator.is_main_process else None
        if self._end is not None:
            self.warn(f"step {self.step}: {self._end}")
        return self._any_process(self._end is not None)

    def _any_process(self, flag: bool) -> bool:
        if self.accelerator.num_processes == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(float(flag), device=self.accelerator.device), "sum") > 0)

    def _render(self) -> None:
        if self.prepared.validation is None or not self.accelerator.is_main_process:
            return
        network = self.learner.adaptation.network
        with self.learner.averaged():
            self.prepared.validation.render(network, self.folder.sample(self.step), f"step {self.step}")

    def _save(self) -> None:
        main = self.accelerator.is_main_process
        publish = self.folder.checkpoint(self.step, self.config.keep_checkpoints) if main else None
        with publish or contextlib.nullcontext(self.folder.unfinished(self.step)) as folder:
            self.accelerator.wait_for_everyone()
            self.learner.save(folder)
            if main:
                about = {
                    "step": self.step,
                    "data": self.prepared.data.fingerprint,
                    "weights": self._weights,
                    "processes": self.accelerator.num_processes,
                    "first_look": self.first_look,
                    "warned": self._warned,
                    "facts": self.facts(),
                }
                (folder / "trainer.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
            self.accelerator.wait_for_everyone()

    def _resume(self, checkpoint: Checkpoint) -> None:
        about = checkpoint.about()
        for name, now, what, why in (
            ("data", self.prepared.data.fingerprint, "training data", "rows, captions or images changed"),
            ("weights", self._weights, "model's weights", "another version, or trained since"),
        ):
            if about[name] != now:
                raise InputError(
                    f"the {what} are not those that {str(self.config.output)!r} was begun with ({why}); "
                    "restore them to resume, or choose another output"
                )
        known, own = about["facts"], self.facts()
        if changed := [name for name in own if known.get(name, own[name]) != own[name]]:
            raise InputError(
                f"the {' and the '.join(changed)} changed since {str(self.config.output)!r} was begun; restore what "
                "was there to resume, or choose another output"
            )
        with checkpoint.damage_told():
            self.learner.load(checkpoint.path)
        self.step, self.first_look, self._warned = about["step"], about["first_look"], about["warned"]
        before, count = about["processes"], self.accelerator.num_processes
        if before != count:
            self.warn(
                f"step {self.step}: begun with {before} processes and resumed with {count}: batches differ from an "
                "undisturbed run"
            )

    def _start_loggers(self) -> None:
        if self.config.tensorboard or self.config.wandb:
            self.accelerator.init_trackers(self.config.wandb or "tensorboard")

    def _log(self, values: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            self.folder.log({"step": self.step, **values})
        if self.config.tensorboard or self.config.wandb:
            self.accelerator.log(values, step=self.step)


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
