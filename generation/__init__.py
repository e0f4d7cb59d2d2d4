"""Image generators in line with text and with people: sampling, preference data, fine-tuning, export.

Names below are imported when first used, so that `import generation` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from .best_of_n import BestOfN, best_of_n
    from .data import CheckedData, check_data
    from .diversity import compare_prompts, diversity_prompts, measure_diversity
    from .export import export_lora
    from .images import GeneratedImage, read_settings
    from .latent_scorer import LatentScorer, fit_latent_scorer
    from .lora import add_lora
    from .lora_mixing import mix_adapters
    from .methods import (
        METHODS,
        AlignPropConfig,
        AlignPropTrainer,
        D2AlignConfig,
        D2AlignTrainer,
        DiffusionDPOConfig,
        DiffusionDPOTrainer,
        DirectAlignConfig,
        DirectAlignTrainer,
        DRaFTConfig,
        DRaFTLVConfig,
        DRaFTLVTrainer,
        DRaFTTrainer,
        GRPOConfig,
        GRPOTrainer,
        MaPOConfig,
        MaPOTrainer,
        ReFLConfig,
        ReFLTrainer,
        RewardGradientConfig,
        RewardGradientTrainer,
        RewardWeightedConfig,
        RewardWeightedTrainer,
        SoftREPAConfig,
        SoftREPATrainer,
        SupervisedConfig,
        SupervisedTrainer,
    )
    from .objectives import diffusion_dpo_loss, mapo_loss, reward_weighted_loss
    from .pipelines import load_pipeline
    from .prompt_revision import RevisionRequest, emphasise_misaligned
    from .reward_gradient import RewardGradientOptions, graded_latents
    from .rewards import (
        CosineReward,
        DirectionalReward,
        EmbeddingReward,
        Reward,
        as_reward,
        fit_reward_direction,
        load_reward,
        load_rewards,
    )
    from .sampling import generate, generate_again, generate_each
    from .soft_tokens import SoftTokens, soft_tokens_applied
    from .tiny import tiny_pipeline
    from .training import (
        DenoisingTrainer,
        RewardConfig,
        RewardTrainer,
        RunConfig,
        Trainer,
        TrainingConfig,
        TrainingReport,
        load_config,
    )

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "best_of_n": ["BestOfN", "best_of_n"],
        "data": ["CheckedData", "check_data"],
        "diversity": ["compare_prompts", "diversity_prompts", "measure_diversity"],
        "export": ["export_lora"],
        "images": ["GeneratedImage", "read_settings"],
        "latent_scorer": ["LatentScorer", "fit_latent_scorer"],
        "lora": ["add_lora"],
        "lora_mixing": ["mix_adapters"],
        "methods": [
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
        ],
        "objectives": ["diffusion_dpo_loss", "mapo_loss", "reward_weighted_loss"],
        "pipelines": ["load_pipeline"],
        "prompt_revision": ["RevisionRequest", "emphasise_misaligned"],
        "reward_gradient": ["RewardGradientOptions", "graded_latents"],
        "rewards": [
            "CosineReward",
            "DirectionalReward",
            "EmbeddingReward",
            "Reward",
            "as_reward",
            "fit_reward_direction",
            "load_reward",
            "load_rewards",
        ],
        "sampling": ["generate", "generate_again", "generate_each"],
        "soft_tokens": ["SoftTokens", "soft_tokens_applied"],
        "tiny": ["tiny_pipeline"],
        "training": [
            "DenoisingTrainer",
            "RewardConfig",
            "RewardTrainer",
            "RunConfig",
            "Trainer",
            "TrainingConfig",
            "TrainingReport",
            "load_config",
        ],
    },
)
