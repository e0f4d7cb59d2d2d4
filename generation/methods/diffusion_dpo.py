"""Diffusion-DPO (arXiv 2311.12908): preference pairs against a frozen reference."""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float
from pydantic.dataclasses import dataclass
from torch import Tensor

from ..objectives import diffusion_dpo_loss
from ..training.configuration import STRICT, TrainingConfig, setting
from ..training.denoiser import Batch
from ..training.trainer import Trainer

__all__ = ["DiffusionDPOConfig", "DiffusionDPOTrainer"]


@dataclass(config=STRICT, kw_only=True)
class DiffusionDPOConfig(TrainingConfig):
    """Settings of `DiffusionDPOTrainer`. The paper's batch is 2,048 pairs: raise `accumulation` as far as you can."""

    method: ClassVar[str] = "diffusion-dpo"

    beta: float = setting(5000.0, "Strength of the pull to the reference.", gt=0)


class DiffusionDPOTrainer(Trainer):
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
