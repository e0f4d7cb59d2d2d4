"""Rewards: how good an image is, for its prompt or in itself, as a number; larger is better.

`load_reward` finds one by name. What sees image and prompt as two vectors (the CLIP family, and heads on it) is an
`EmbeddingReward`, with gradients to the pixels; any callable of images and prompts is a reward as well. The mathematics
is in `scores`. Names below are imported when first used.
"""

# ruff: noqa: F401 (`__all__` comes from lazy_loader)
from __future__ import annotations

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from . import scores
    from .aesthetic import Aesthetic, AestheticHead, read_aesthetic_head
    from .clip_score import CLIPScore
    from .cosine import CosineReward
    from .direction import DirectionalReward, RewardDirection, fit_reward_direction, learn_reward_direction
    from .embedding import EmbeddingReward
    from .f_clip_score import FCLIPScore
    from .hps import HPS, load_hps
    from .jpeg_size import JPEGSize
    from .pick_score import PickScore, load_pick_score
    from .redness import Redness
    from .registry import load_reward, load_rewards, register_reward
    from .remote import RemoteReward
    from .reward import AnyReward, Reward, as_reward
    from .scoring import ScoredImage, ScoreTable, score_files
    from .weighted_sum import WeightedSum
    from .word_influence import WordInfluence, word_influence

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["scores"],
    submod_attrs={
        "aesthetic": ["Aesthetic", "AestheticHead", "read_aesthetic_head"],
        "clip_score": ["CLIPScore"],
        "cosine": ["CosineReward"],
        "direction": ["DirectionalReward", "RewardDirection", "fit_reward_direction", "learn_reward_direction"],
        "embedding": ["EmbeddingReward"],
        "f_clip_score": ["FCLIPScore"],
        "hps": ["HPS", "load_hps"],
        "jpeg_size": ["JPEGSize"],
        "pick_score": ["PickScore", "load_pick_score"],
        "redness": ["Redness"],
        "registry": ["load_reward", "load_rewards", "register_reward"],
        "remote": ["RemoteReward"],
        "reward": ["AnyReward", "Reward", "as_reward"],
        "scoring": ["ScoreTable", "ScoredImage", "score_files"],
        "weighted_sum": ["WeightedSum"],
        "word_influence": ["WordInfluence", "word_influence"],
    },
)
