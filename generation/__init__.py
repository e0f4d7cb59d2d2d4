"""Image generators in line with text and with people: sampling, preference data, fine-tuning, export.

Names below are imported when first used, so that `import generation` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from .data import CheckedData, check_data
    from .export import export_lora
    from .images import GeneratedImage, read_settings
    from .lora import add_lora
    from .methods import (
        METHODS,
        DiffusionDPOConfig,
        DiffusionDPOTrainer,
        MaPOConfig,
        MaPOTrainer,
        RewardWeightedConfig,
        RewardWeightedTrainer,
        SupervisedConfig,
        SupervisedTrainer,
    )
    from .objectives import diffusion_dpo_loss, mapo_loss, reward_weighted_loss
    from .pipelines import load_pipeline
    from .rewards import CosineReward, Reward, as_reward
    from .sampling import generate, generate_again, generate_each
    from .tiny import tiny_pipeline
    from .training import DenoisingTrainer, Trainer, TrainingConfig, TrainingReport, load_config

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "data": ["CheckedData", "check_data"],
        "export": ["export_lora"],
        "images": ["GeneratedImage", "read_settings"],
        "lora": ["add_lora"],
        "methods": [
            "METHODS",
            "DiffusionDPOConfig",
            "DiffusionDPOTrainer",
            "MaPOConfig",
            "MaPOTrainer",
            "RewardWeightedConfig",
            "RewardWeightedTrainer",
            "SupervisedConfig",
            "SupervisedTrainer",
        ],
        "objectives": ["diffusion_dpo_loss", "mapo_loss", "reward_weighted_loss"],
        "pipelines": ["load_pipeline"],
        "rewards": ["CosineReward", "Reward", "as_reward"],
        "sampling": ["generate", "generate_again", "generate_each"],
        "tiny": ["tiny_pipeline"],
        "training": ["DenoisingTrainer", "Trainer", "TrainingConfig", "TrainingReport", "load_config"],
    },
)
