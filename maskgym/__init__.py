"""maskgym: adaptive inference for vision-language models, with masking as a reinforcement-learning environment.

Importing it registers ``maskgym/Masking-v0`` with Gymnasium.
"""

import gymnasium

from maskgym.adaptive import AdaptiveVLM
from maskgym.backbones import MaskLayout, Masks, Query, load_backbone
from maskgym.envs import MaskingVecEnv, RewardTerms, load_queries

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
    entry_point="maskgym.envs.masking_env:MaskingEnv",
    vector_entry_point="maskgym.envs.masking_env:MaskingVectorEnv",
)
