"""The Stable-Baselines3 skin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvStepReturn

from envs.core import MaskingCore, Slots


class MaskingVecEnv(VecEnv):
    """The environment as a ``VecEnv``: one batched call of the backbone a step.

    Each info holds the raw terms, ``terminal_observation``, and ``episode`` (so no ``VecMonitor`` is needed).

    Args:
        core: draws and executes.
        num_envs: slots.
        plans_per_query: consecutive slots that answer the same query and budget.

    Attributes:
        executed: query numbers (B,) and flat actions (B, A) of the last step.
    """

    executed: tuple[np.ndarray, np.ndarray]

    def __init__(self, core: MaskingCore, num_envs: int, plans_per_query: int = 1):
        self.core = core
        self.slots = Slots(core, num_envs, plans_per_query)
        self.render_mode = None  # VecEnv.__init__ asks for it
        self._actions = np.zeros((num_envs, core.layout.size), np.int8)
        super().__init__(num_envs, core.observation_space, core.action_space)

    def reset(self) -> dict[str, np.ndarray]:
        seed = self._seeds[0]
        if seed is not None or not self.slots.generators:
            self.slots.seed(seed)
        self._reset_seeds()
        self._reset_options()
        self.slots.draw()
        return self.slots.observe()

    def step_async(self, actions: np.ndarray) -> None:
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        last = self.slots.observe()
        self.executed = self.slots.numbers, self._actions
        outcome = self.slots.step(self._actions)
        self.slots.draw()
        columns = {name: values.tolist() for name, values in outcome.info.items()}
        rewards = outcome.rewards.astype(np.float32)
        infos: list[dict[str, Any]] = [
            {
                **{name: values[row] for name, values in columns.items()},
                "terminal_observation": {name: values[row] for name, values in last.items()},
                "TimeLimit.truncated": False,
                "episode": {"r": float(rewards[row]), "l": 1, "t": 0.0},
            }
            for row in range(self.num_envs)
        ]
        return self.slots.observe(), rewards, np.ones(self.num_envs, bool), infos

    def close(self) -> None:
        pass

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        return [getattr(self, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        setattr(self, attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: VecEnvIndices = None, **kwargs: Any) -> list[Any]:
        return [getattr(self, method_name)(*args, **kwargs)] * len(list(self._get_indices(indices)))

    def env_is_wrapped(self, wrapper_class: type, indices: VecEnvIndices = None) -> list[bool]:
        return [False] * len(list(self._get_indices(indices)))

    def state(self) -> dict[str, Any]:
        """Everything that ``load_state`` needs to continue as if never stopped; JSON data."""
        return {
            "numbers": self.slots.numbers.tolist(),
            "budgets": self.slots.budgets.tolist(),
            "generators": [generator.bit_generator.state for generator in self.slots.generators],
            "reward": self.core.reward.state(),
            "left_out": self.core.left_out.state(),
        }

    def load_state(self, state: dict[str, Any]) -> dict[str, np.ndarray]:
        """Continue from ``state``; returns the observation that the next action answers."""
        self.slots.seed(0)
        for generator, saved in zip(self.slots.generators, state["generators"], strict=True):
            generator.bit_generator.state = saved
        self.core.reward.load_state(state["reward"])
        if "left_out" in state:  # checkpoints of versions that ended at the first query that failed have none
            self.core.left_out.load_state(state["left_out"])
        self.slots.numbers = np.array(state["numbers"], np.int64)
        self.slots.budgets = np.array(state["budgets"], np.float32)
        return self.slots.observe()


def info_columns(infos: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, np.ndarray]:
    """Some entries of a list of infos as arrays (B,)."""
    return {name: np.array([info[name] for info in infos]) for name in names}
