"""A config and a trainer for each training method; the mathematics of each is in `generation.objectives`."""

from __future__ import annotations

from ..training.trainer import Trainer
from .d2_align import D2AlignConfig, D2AlignTrainer
from .diffusion_dpo import DiffusionDPOConfig, DiffusionDPOTrainer
from .grpo import GRPOTrainer
from .grpo_settings import GRPOConfig
from .mapo import MaPOConfig, MaPOTrainer
from .reward_gradient import (
    AlignPropConfig,
    AlignPropTrainer,
    DirectAlignConfig,
    DirectAlignTrainer,
    DRaFTConfig,
    DRaFTLVConfig,
    DRaFTLVTrainer,
    DRaFTTrainer,
    ReFLConfig,
    ReFLTrainer,
    RewardGradientConfig,
    RewardGradientTrainer,
)
from .reward_weighted import RewardWeightedConfig, RewardWeightedTrainer
from .softrepa import SoftREPAConfig, SoftREPATrainer
from .supervised import SupervisedConfig, SupervisedTrainer

__all__ = [
    "METHODS",
    "AlignPropConfig",
    "AlignPropTrainer",
    "D2AlignConfig",
    "D2AlignTrainer",
    "DRaFTConfig",
    "DRaFTLVConfig",
    "DRaFTLVTrainer",
    "DRaFTTrainer",
    "DiffusionDPOConfig",
    "DiffusionDPOTrainer",
    "DirectAlignConfig",
    "DirectAlignTrainer",
    "GRPOConfig",
    "GRPOTrainer",
    "MaPOConfig",
    "MaPOTrainer",
    "ReFLConfig",
    "ReFLTrainer",
    "RewardGradientConfig",
    "RewardGradientTrainer",
    "RewardWeightedConfig",
    "RewardWeightedTrainer",
    "SoftREPAConfig",
    "SoftREPATrainer",
    "SupervisedConfig",
    "SupervisedTrainer",
]

METHODS: dict[str, type[Trainer]] = {
    trainer.config_class.method: trainer
    for trainer in (
        MaPOTrainer,
        DiffusionDPOTrainer,
        RewardWeightedTrainer,
        SupervisedTrainer,
        SoftREPATrainer,
        AlignPropTrainer,
        DRaFTTrainer,
        DRaFTLVTrainer,
        ReFLTrainer,
        DirectAlignTrainer,
        D2AlignTrainer,
        GRPOTrainer,
    )
}
