"""MaPO (arXiv 2406.06424): preference pairs, no reference model."""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from ..objectives import mapo_loss
from ..training.configuration import TrainingConfig, setting, settings
from ..training.denoiser import Batch
from ..training.denoising import DenoisingTrainer

__all__ = ["MaPOConfig", "MaPOTrainer"]


@settings
class MaPOConfig(TrainingConfig):
    """Settings of `MaPOTrainer`; the defaults are the authors' published recipe with LoRA rank 64."""

    method: ClassVar[str] = "mapo"
    summary: ClassVar[str] = "MaPO: preference pairs, no reference model (arXiv 2406.06424)."

    beta: float = setting(0.1, "Weight of the margin term against the winners' denoising.", ge=0)
    snr_value: float = setting(0.5, "Scale s of the errors inside the score, one constant.", gt=0)
    min_snr_gamma: float | None = setting(
        None, "Weight the denoising term by min-SNR (arXiv 2303.09556); 5 is usual.", gt=0
    )


class MaPOTrainer(DenoisingTrainer):
    """Raises the margin between winners and losers while denoising winners; one forward pass over both."""

    config_class = MaPOConfig
    config: MaPOConfig

    def loss(self, batch: Batch) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """`mapo_loss`; values of each pair."""
        weights = None
        if self.config.min_snr_gamma is not None:
            weights = self.denoiser.min_snr_weights(batch.timesteps.chunk(2)[0], self.config.min_snr_gamma)
        terms = mapo_loss(
            self.denoiser.predict(batch),
            self.denoiser.target(batch),
            beta=self.config.beta,
            snr_value=self.config.snr_value,
            num_train_timesteps=self.denoiser.num_train_timesteps,
            denoising_weights=weights,
        )
        z = terms.z.detach()
        return terms.loss, {
            "mse_w": terms.mse_w.detach(),
            "mse_l": terms.mse_l.detach(),
            "margin_accuracy": (z > 0).to(z.dtype),
            "saturated": (z.abs() > 5).to(z.dtype),
            "ratio_loss": -terms.ratio_losses.detach(),
            "score_w": terms.score_w.detach(),
            "score_l": terms.score_l.detach(),
        }
