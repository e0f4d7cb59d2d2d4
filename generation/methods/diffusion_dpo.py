"""Diffusion-DPO (arXiv 2311.12908): preference pairs against a frozen reference."""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from ..objectives import diffusion_dpo_loss
from ..training.configuration import TrainingConfig, setting, settings
from ..training.denoiser import Batch
from ..training.denoising import DenoisingTrainer

__all__ = ["DiffusionDPOConfig", "DiffusionDPOTrainer"]


@settings
class DiffusionDPOConfig(TrainingConfig):
    """Settings of `DiffusionDPOTrainer`. The paper's batch is 2,048 pairs: raise `accumulation` as far as you can."""

    method: ClassVar[str] = "diffusion-dpo"
    summary: ClassVar[str] = "Diffusion-DPO: preference pairs against a frozen reference (arXiv 2311.12908)."

    beta: float = setting(5000.0, "Strength of the pull to the reference.", gt=0)


class DiffusionDPOTrainer(DenoisingTrainer):
    """Two forward passes over each pair, one of them by the reference: for a LoRA the same network, adapters off."""

    config_class = DiffusionDPOConfig
    config: DiffusionDPOConfig
    needs_reference = True

    def loss(self, batch: Batch) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """`diffusion_dpo_loss`; values of each pair."""
        # The reference first: with gradient checkpointing, backward recomputes the forward pass with adapters on.
        with self.reference() as reference:
            ref_pred = self.denoiser.predict(batch, reference)
        terms = diffusion_dpo_loss(
            self.denoiser.predict(batch), ref_pred, self.denoiser.target(batch), beta=self.config.beta
        )
        return terms.loss, {
            "mse_w": terms.mse_w.detach(),
            "mse_l": terms.mse_l.detach(),
            "ref_mse_w": terms.ref_mse_w,
            "ref_mse_l": terms.ref_mse_l,
            "margin_accuracy": terms.ranked_right(),
        }
