"""The Stable-Baselines3 skin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvStepReturn

from maskgym.common.errors import InputError
from maskgym.envs.core import MaskingCore, Slots
from maskgym.envs.frames import checked_mode
from maskgym.envs.resets import one_each


class MaskingVecEnv(VecEnv):
    """The environment as a ``VecEnv``: one batched call of the backbone a step, and one backbone for all slots.

    Each info holds the raw terms, ``terminal_observation``, and ``episode`` (so no ``VecMonitor`` is needed).
    ``set_options`` takes what ``MaskingEnv.reset`` takes, for all slots or a list with one dict a slot, and holds for
    the next ``reset``. Pictures are as of ``MaskingVectorEnv``.

    Args:
        core: draws and executes; ``MaskingVecEnv.make`` makes one.
        num_envs: slots.
        plans_per_query: consecutive slots that answer the same query and budget.
        render_mode: ``"rgb_array"`` for pictures.
    """

    def __init__(self, core: MaskingCore, num_envs: int, plans_per_query: int = 1, render_mode: str | None = None):
        self.core = core
        self.slots = Slots(core, num_envs, plans_per_query)
        self.render_mode = checked_mode(render_mode)  # VecEnv.__init__ asks for it
        self._actions = np.zeros((num_envs, core.layout.size), np.int8)
        super().__init__(num_envs, core.observation_space, core.action_space)

    @classmethod
    def make(
        cls, num_envs: int = 1, plans_per_query: int = 1, render_mode: str | None = None, **options: Any
    ) -> MaskingVecEnv:
        """The environment from plain data, as ``gymnasium.make_vec`` makes Gymnasium's.

        Args:
            num_envs: slots.
            plans_per_query: consecutive slots that answer the same query and budget.
            render_mode: ``"rgb_array"`` for pictures.
            **options: of ``MaskingCore``: ``backbone``, ``data``, ``reward``, ``budgets``, ``observation`` and so on.
        """
        return cls(MaskingCore(**options), num_envs, plans_per_query, render_mode)

    @property
    def executed(self) -> tuple[np.ndarray, np.ndarray]:
        """Query numbers (B,) and flat actions (B, A) of the last step."""
        assert self.slots.executed is not None, "no step was made"
        return self.slots.executed

    def reset(self) -> dict[str, np.ndarray]:
        self.slots.reset(self._seeds[0], one_each("set_options", self._options, self.num_envs))
        self._reset_seeds()
        self._reset_options()
        return self.slots.observe()

    def step_async(self, actions: np.ndarray) -> None:
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        outcome = self.slots.step(self._actions)
        last = self.slots.observe()
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
        """End the episodes; nothing else is held open."""
        self.slots.close()

    def get_images(self) -> Sequence[np.ndarray | None]:
        return self.slots.render()

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """An attribute, which all slots share, once for each that is asked for."""
        return [getattr(self, attr_name) for _ in self._chosen(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute of all slots.

        Raises:
            InputError: not all are chosen; they share one environment.
        """
        if len(set(self._chosen(indices))) < self.num_envs:
            raise InputError(
                f"set_attr({attr_name!r}) is for some slots, which share one environment; leave out indices"
            )
        setattr(self, attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: VecEnvIndices = None, **kwargs: Any) -> list[Any]:
        """Refused: slots have no methods.

        Raises:
            InputError: always.
        """
        raise InputError(f"env_method({method_name!r}) is for single environments; these slots share one: call its own")

    def env_is_wrapped(self, wrapper_class: type, indices: VecEnvIndices = None) -> list[bool]:
        """True for ``Monitor`` alone: its ``episode`` is in the infos, so evaluations need no other."""
        return [wrapper_class is Monitor for _ in self._chosen(indices)]

    def _chosen(self, indices: VecEnvIndices) -> list[int]:
        """Slots by number; like a list's, from the end where negative."""
        return [range(self.num_envs)[index] for index in self._get_indices(indices)]

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
        self.slots.running = True
        return self.slots.observe()


def info_columns(infos: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, np.ndarray]:
    """Some entries of a list of infos as arrays (B,)."""
    return {name: np.array([info[name] for info in infos]) for name in names}
