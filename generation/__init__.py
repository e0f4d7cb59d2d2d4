"""Image generators in line with text and with people: sampling, preference data, fine-tuning, export.

Names below are imported when first used, so that `import generation` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from .data import check_data
    from .images import GeneratedImage, read_settings
    from .methods import (
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
    from .sampling import generate, generate_each
    from .tiny import tiny_pipeline

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "data": ["check_data"],
        "images": ["GeneratedImage", "read_settings"],
        "methods": [
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
        "sampling": ["generate", "generate_each"],
        "tiny": ["tiny_pipeline"],
    },
)
