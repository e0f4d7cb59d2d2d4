"""Rewards: how good an image is, for its prompt or in itself, as a number."""

from .cosine import CosineReward
from .embedding import EmbeddingReward
from .reward import AnyReward, Reward, as_reward

__all__ = ["AnyReward", "CosineReward", "EmbeddingReward", "Reward", "as_reward"]
