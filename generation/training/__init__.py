"""The training loop and what it stands on; the methods themselves are in `generation.methods`."""

# ruff: noqa: F401 (`__all__` comes from lazy_loader)
from __future__ import annotations

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from .configuration import RunConfig, TrainingConfig, load_config
    from .denoising import DenoisingTrainer
    from .reward_training import RewardConfig, RewardTrainer
    from .trainer import Trainer, TrainingReport

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "configuration": ["RunConfig", "TrainingConfig", "load_config"],
        "denoising": ["DenoisingTrainer"],
        "reward_training": ["RewardConfig", "RewardTrainer"],
        "trainer": ["Trainer", "TrainingReport"],
    },
)
