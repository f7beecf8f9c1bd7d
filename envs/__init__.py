"""Choosing masks as a reinforcement-learning environment."""

from envs.core import MaskingCore
from envs.masking_env import MaskingEnv, MaskingVectorEnv
from envs.queries import DatasetQueries, load_queries
from envs.rewards import REWARDS, RewardTerms, WeightedReward
from envs.sb3_env import MaskingVecEnv

__all__ = [
    "REWARDS",
    "DatasetQueries",
    "MaskingCore",
    "MaskingEnv",
    "MaskingVecEnv",
    "MaskingVectorEnv",
    "RewardTerms",
    "WeightedReward",
    "load_queries",
]
