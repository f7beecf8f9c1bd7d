"""maskgym: adaptive inference for vision-language models, with masking as a reinforcement-learning environment.

Importing it registers ``maskgym/Masking-v0`` with Gymnasium.
"""

import gymnasium

from backbones import MaskLayout, Masks, Query, load_backbone
from envs import MaskingVecEnv, RewardTerms, load_queries
from maskgym.adaptive import AdaptiveVLM

__all__ = [
    "AdaptiveVLM",
    "MaskLayout",
    "MaskingVecEnv",
    "Masks",
    "Query",
    "RewardTerms",
    "load_backbone",
    "load_queries",
]

gymnasium.register(
    id="maskgym/Masking-v0",
    entry_point="envs.masking_env:MaskingEnv",
    vector_entry_point="envs.masking_env:MaskingVectorEnv",
)
