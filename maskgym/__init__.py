"""maskgym: adaptive inference for vision-language models, with masking as a reinforcement-learning environment.

Importing it registers ``maskgym/Masking-v0`` with Gymnasium. What it offers is imported when it is first used, and
torch with it.
"""

from importlib import import_module
from typing import TYPE_CHECKING

import gymnasium

if TYPE_CHECKING:
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

_FOUND_IN = {
    "maskgym.adaptive": ("AdaptiveVLM",),
    "maskgym.backbones": ("MaskLayout", "Masks", "Query", "load_backbone"),
    "maskgym.envs": ("MaskingVecEnv", "RewardTerms", "load_queries"),
}
"""The names of ``__all__`` by the module that has them."""

if not TYPE_CHECKING:  # a type checker would take any name from it

    def __getattr__(name: str) -> object:
        for module, names in _FOUND_IN.items():
            if name in names:
                globals()[name] = getattr(import_module(module), name)
                return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


gymnasium.register(
    id="maskgym/Masking-v0",
    entry_point="maskgym.envs.masking_env:MaskingEnv",
    vector_entry_point="maskgym.envs.masking_env:MaskingVectorEnv",
)
