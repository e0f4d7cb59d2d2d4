"""Plain fine-tuning on the preferred images: the baseline of every preference method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from ..objectives import denoising_errors
from ..training.configuration import TrainingConfig, setting, settings
from ..training.denoiser import Batch
from ..training.denoising import DenoisingTrainer

__all__ = ["SupervisedConfig", "SupervisedTrainer"]


@settings
class SupervisedConfig(TrainingConfig):
    """Settings of `SupervisedTrainer`. Data are pairs, whose winners are taken, or captioned images."""

    method: ClassVar[str] = "sft"
    summary: ClassVar[str] = "Plain fine-tuning on preferred or captioned images."

    min_snr_gamma: float | None = setting(
        None, "Weight the denoising term by min-SNR (arXiv 2303.09556); 5 is usual.", gt=0
    )


class SupervisedTrainer(DenoisingTrainer):
    """Denoises winners and ignores losers."""

    config_class = SupervisedConfig
    config: SupervisedConfig
    unit = "winners"
    shown: ClassVar[Mapping[str, tuple[str, str]]] = {
        name: form for name, form in DenoisingTrainer.shown.items() if name != "ranked right"
    }

    def loss(self, batch: Batch) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """The denoising error, weighted by min-SNR if asked for."""
        errors = denoising_errors(self.denoiser.predict(batch), self.denoiser.target(batch))
        values = {"mse_w": errors.detach()}
        if self.config.min_snr_gamma is not None:
            errors = errors * self.denoiser.min_snr_weights(batch.timesteps, self.config.min_snr_gamma)
        return errors.mean(), values
