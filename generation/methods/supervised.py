"""Plain fine-tuning on the preferred images: the baseline of every preference method."""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float
from pydantic.dataclasses import dataclass
from torch import Tensor

from ..objectives import denoising_errors, min_snr_weights
from ..training.configuration import STRICT, TrainingConfig, setting
from ..training.denoiser import Batch
from ..training.trainer import Trainer

__all__ = ["SupervisedConfig", "SupervisedTrainer"]


@dataclass(config=STRICT, kw_only=True)
class SupervisedConfig(TrainingConfig):
    """Settings of `SupervisedTrainer`. Data are pairs, whose winners are taken, or captioned images."""

    method: ClassVar[str] = "sft"

    min_snr_gamma: float | None = setting(
        None, "Weight the denoising term by min-SNR (arXiv 2303.09556); 5 is usual.", gt=0
    )


class SupervisedTrainer(Trainer):
    """Denoises winners and ignores losers."""

    config_class = SupervisedConfig
    config: SupervisedConfig
    unit = "winners"

    def loss(self, batch: Batch) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """The denoising error, weighted by min-SNR if asked for."""
        errors = denoising_errors(self.denoiser.predict(batch), self.denoiser.target(batch))
        values = {"mse_w": errors.detach()}
        if self.config.min_snr_gamma is not None:
            velocity = self.denoiser.prediction_type == "v_prediction"
            snr = self.denoiser.snr(batch.timesteps)
            errors = errors * min_snr_weights(snr, self.config.min_snr_gamma, v_prediction=velocity)
        return errors.mean(), values
