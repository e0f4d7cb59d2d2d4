"""Rewards: how good an image is, for its prompt or in itself, as a number."""

from .cosine import CosineReward
from .reward import Reward, as_reward

__all__ = ["CosineReward", "Reward", "as_reward"]
