"""A config and a trainer for each training method; the mathematics of each is in `generation.objectives`."""

from __future__ import annotations

from ..training.trainer import Trainer
from .diffusion_dpo import DiffusionDPOConfig, DiffusionDPOTrainer
from .mapo import MaPOConfig, MaPOTrainer
from .reward_weighted import RewardWeightedConfig, RewardWeightedTrainer
from .supervised import SupervisedConfig, SupervisedTrainer

__all__ = [
    "METHODS",
    "DiffusionDPOConfig",
    "DiffusionDPOTrainer",
    "MaPOConfig",
    "MaPOTrainer",
    "RewardWeightedConfig",
    "RewardWeightedTrainer",
    "SupervisedConfig",
    "SupervisedTrainer",
]

METHODS: dict[str, type[Trainer]] = {
    trainer.config_class.method: trainer
    for trainer in (MaPOTrainer, DiffusionDPOTrainer, RewardWeightedTrainer, SupervisedTrainer)
}
