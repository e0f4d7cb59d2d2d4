"""Training a denoiser on stored, captioned images: what every method has in common whose loss is of noisy latents."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from jaxtyping import Float
from torch import Tensor

from mmalign.errors import InputError

from ..data import CheckedData
from .configuration import RunConfig, TrainingConfig
from .denoiser import Denoiser
from .encoding import LatentEncoder, PromptEncoder
from .feed import TrainingData
from .monitor import collapse_warnings, mean_of, winner_drift
from .preparation import Encoders, check, encode, filter_of
from .trainer import Prepared, Trainer
from .training_set import EncodedSet
from .validation import Validation

if TYPE_CHECKING:
    from collections.abc import Iterable

    from diffusers import DiffusionPipeline

    from ..rewards.reward import AnyReward

__all__ = ["DenoisingData", "DenoisingTrainer"]


class DenoisingData(TrainingData, Protocol):
    """Training data with fixed samples to look at again and again."""

    def probe(self, size: int) -> Iterable[Any]:
        """Batches of `size` samples in all, with fixed noise and timesteps."""


class DenoisingTrainer(Trainer):
    """Trains on latents and embeddings of checked images, cached before the first step.

    Attributes:
        unit: what a sample is: "pairs", "winners" or "images" (see `samples_of`).
        scored: single images must have a reward; those without are left out.
        denoiser: the network with its noise schedule.
    """

    config_class: ClassVar[type[RunConfig]] = TrainingConfig
    config: TrainingConfig
    unit: ClassVar[str] = "pairs"
    scored: ClassVar[bool] = False
    families = ("sdxl", "sd15")
    shown: ClassVar[Mapping[str, tuple[str, str]]] = {
        "loss": ("loss", "{:.4f}"),
        "ranked right": ("margin_accuracy", "{:.0%}"),
        "drift": ("winner_drift", "{:+.1%}"),
        "memory": ("peak_memory_gb", "{:.1f} GB"),
    }
    panels: Mapping[str, tuple[str, ...]] = {
        "loss": ("loss",),
        "denoising error (probe)": ("probe_mse_w", "probe_mse_l", "probe_mse"),
        "margin accuracy": ("margin_accuracy", "probe_margin_accuracy"),
        "gradient norm": ("grad_norm",),
    }
    denoiser: Denoiser

    def __init__(
        self, config: TrainingConfig, *, pipeline: DiffusionPipeline | None = None, reward: AnyReward | None = None
    ) -> None:
        """Nothing is loaded yet.

        Args:
            config: all settings.
            pipeline: trained in place of `config.model`; its denoiser is changed.
            reward: any reward of images and captions, for `min_score` and `min_margin` to filter the rows by.
        """
        super().__init__(config, pipeline=pipeline)
        self._reward = reward

    @abstractmethod
    def loss(self, batch: Any) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """Of a `Batch`: see `Trainer.loss`. Values `mse_w` (the winners' error) and `margin_accuracy` are watched."""

    def check_settings(self) -> None:
        """Refuse a run without data, and one that would write among them."""
        data, output = self.config.data, self.config.output
        if not data:
            raise InputError("no training data given; set data to a folder, Parquet files or datasets:NAME")
        super().check_settings()
        folder = Path(data).expanduser()
        if folder.is_dir() and output.resolve().is_relative_to(folder.resolve()):
            raise InputError(f"output {str(output)!r} is in the training data {data!r}; give a folder elsewhere")

    def prepare(self) -> Prepared:
        """Check the rows first, as that is cheap and fails early; then load the model and encode what is missing."""
        checked = self.check_rows()
        pipeline, device = self.load_pipeline(), self.accelerator.device
        encoders = Encoders(pipeline, LatentEncoder(pipeline.vae, device), PromptEncoder(pipeline, device))
        data = self.encode_rows(checked, encoders)
        validation = None
        if self.config.validation_prompts:
            validation = Validation(pipeline, encoders.prompts, encoders.latents, self.config)
        if self.config.cache:
            encoders.release()
        return Prepared(pipeline, data, validation, sum(rows.left_out for rows in checked))

    def check_rows(self) -> list[CheckedData]:
        """The usable rows of each set of data, of which there is one; a method that trains on a second adds it here."""
        config = self.config
        self._filter = filter_of(config, self._reward)
        chosen = {"split": config.split, "reward": self._filter, "min_margin": config.min_margin, "scored": self.scored}
        return [self._checked(config.data, self.unit, "left_out_rows", **chosen)]

    def encode_rows(self, checked: list[CheckedData], encoders: Encoders) -> DenoisingData:
        """What `check_rows` returned as training data."""
        return self._encoded(checked[0], self.unit, encoders, seed=self.config.seed)

    def connect(self, pipeline: DiffusionPipeline) -> None:
        """Give the network its noise schedule."""
        self.denoiser = Denoiser(self.learner.network, pipeline.scheduler.config)

    def look(self) -> dict[str, float]:
        """Mean values of the probe, and how far the winners' error has drifted."""
        data: Any = self.prepared.data
        parts = [self.loss(batch.to(self.accelerator.device))[1] for batch in data.probe(self.config.probe_size)]
        values = {f"probe_{name}": float(value) for name, value in mean_of(parts).items()} if parts else {}
        drift = winner_drift(self.first_look or values, values)
        return values if drift is None else values | {"winner_drift": drift}

    def judge(self, start: Mapping[str, float], values: Mapping[str, float]) -> dict[str, str]:
        """Warn of winners that fall apart, and of pairs that have nothing left to teach."""
        return collapse_warnings(start, values)

    def _checked(self, data: str, unit: str, report: str, **chosen: Any) -> CheckedData:
        """`check` with this run's settings; `report` names the list of rows that are left out."""
        path = self.folder.path / f"{report}.jsonl"
        return check(
            self.config, self.accelerator, data, unit, report=path, warn=self.warn, min_score=self.config.min_score,
            **chosen,
        )  # fmt: skip

    def _encoded(self, checked: CheckedData, unit: str, encoders: Encoders, *, seed: int) -> EncodedSet:
        return encode(self.config, self.accelerator, checked, unit, encoders, seed=seed)
