"""Choosing masks as a reinforcement-learning environment."""

from maskgym.envs.core import MaskingCore
from maskgym.envs.data.queries import DatasetQueries, load_queries
from maskgym.envs.masking_env import MaskingEnv, MaskingVectorEnv
from maskgym.envs.reward_spec import WeightedReward
from maskgym.envs.rewards import REWARDS, RewardTerms
from maskgym.envs.sb3_env import MaskingVecEnv

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
