"""The Gymnasium skins: ``maskgym/Masking-v0`` alone and vectorised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from maskgym.envs.core import MaskingCore, Outcome, Slots
from maskgym.envs.frames import RENDER_MODES, checked_mode
from maskgym.envs.resets import per_slot


class MaskingEnv(gymnasium.Env[Any, np.ndarray]):
    """Answer one query under a plan within a budget.

    **Action.** ``MultiDiscrete([2] * (N + L*H + L))``: keep (1) or drop (0) each visual token, then each head slot
    layer by layer, then each layer; as integers of any width, booleans or a list. A plan over budget is executed all
    the same; the reward sees it.

    **Observation.** A dict of ``budget`` (1,) in (0, 1] and the query: ``query`` (1,), its number in the bank, or with
    ``observation="features"`` ``visual`` (N, D), ``text`` (T, D) padded with zeros, and ``text_tokens`` (1,).

    **Reward.** By default accuracy minus 0.02 x the share of the full plan's LLM FLOPs spent; see
    ``maskgym.envs.rewards``.

    **Episode.** One step, which terminates; the next needs a ``reset``. ``info`` holds the raw terms: accuracy,
    log-likelihood, FLOPs by part, budget, kept tokens, heads and layers.

    **Pictures.** With ``render_mode="rgb_array"``, ``render`` gives the image as (256, 256, 3) uint8; after the step,
    with the patches of dropped visual tokens dark.

    **Arguments.** Those of ``maskgym.envs.core.MaskingCore``; plain data all of them, so specs serialise.
    """

    metadata = {"render_modes": list(RENDER_MODES), "render_fps": 1}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None, **options: Any):
        self.render_mode = checked_mode(render_mode)
        self.core = MaskingCore(**options)
        self.slots = Slots(self.core, 1)
        self.action_space = self.core.action_space
        self.observation_space = self.core.observation_space

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Draw a query and a budget.

        Args:
            seed: of the draws; None: they go on.
            options: ``{"query": number, "budget": share}`` gives either or both instead.

        Raises:
            InputError: an unknown option, a query number that the source does not have, or a budget outside (0, 1].
        """
        super().reset(seed=seed)
        self.slots.generators = [self.np_random]
        self.slots.reset(None, [options])
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        outcome = self.slots.step(np.asarray(action)[None])
        info = {name: values[0].item() for name, values in outcome.info.items()}
        return self._observation(), float(outcome.rewards[0]), True, False, info

    def render(self) -> Any:
        return self.slots.render()[0] if _may_render(self) else None

    def close(self) -> None:
        """End the episode; nothing else is held open."""
        self.slots.close()

    def _observation(self) -> dict[str, np.ndarray]:
        return {name: values[0] for name, values in self.slots.observe().items()}


class MaskingVectorEnv(VectorEnv[Any, np.ndarray, np.ndarray]):
    """``MaskingEnv`` over ``num_envs`` slots: one batched call of the backbone a step.

    Autoreset is ``SAME_STEP``: the observation after a step is the next episode's, the last one is in
    ``infos["final_obs"]`` and the raw terms, arrays (num_envs,), in ``infos["final_info"]``. ``render`` shows what the
    last step showed the language model; before it, the images.
    """

    metadata = {  # noqa: RUF012
        "render_modes": list(RENDER_MODES),
        "render_fps": 1,
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }

    def __init__(self, num_envs: int = 1, plans_per_query: int = 1, render_mode: str | None = None, **options: Any):
        self.render_mode = checked_mode(render_mode)
        self.core = MaskingCore(**options)
        self.slots = Slots(self.core, num_envs, plans_per_query)
        self.num_envs = num_envs
        self.single_action_space = self.core.action_space
        self.single_observation_space = self.core.observation_space
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.observation_space = batch_space(self.single_observation_space, num_envs)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Draw queries and budgets.

        Args:
            seed: slot i gets seed + i, or its own of a list (num_envs,); None: it goes on.
            options: as of ``MaskingEnv``, for all slots, or lists with one value a slot, None where it is drawn. They
                hold for the first episodes; those that follow are drawn.
        """
        self._check_open()
        self.slots.reset(seed, per_slot(options, self.num_envs))
        return self.slots.observe(), {}

    def step(
        self, actions: np.ndarray
    ) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        self._check_open()
        outcome = self.slots.step(actions)
        last = self.slots.observe()
        self.slots.draw()
        done, never = np.ones(self.num_envs, bool), np.zeros(self.num_envs, bool)
        return self.slots.observe(), outcome.rewards, done, never, _final(last, outcome, done)

    def render(self) -> tuple[Any, ...] | None:
        self._check_open()
        return tuple(self.slots.render()) if _may_render(self) else None

    def _check_open(self) -> None:
        if self.closed:
            raise gymnasium.error.ClosedEnvironmentError("this environment was closed; make another")


def _may_render(env: MaskingEnv | MaskingVectorEnv) -> bool:
    """Whether the environment was made to show pictures; if not, a warning says how."""
    if env.render_mode is None:
        gymnasium.logger.warn(f"render() shows nothing without a render mode: make {env} with render_mode='rgb_array'")
    return env.render_mode is not None


def _final(last: dict[str, np.ndarray], outcome: Outcome, done: np.ndarray) -> dict[str, Any]:
    """Infos in Gymnasium's vector form: arrays, each with a boolean ``_name`` beside it."""
    rows = np.empty(len(done), dtype=object)
    for row in range(len(done)):
        rows[row] = {name: values[row] for name, values in last.items()}
    info: dict[str, Any] = {}
    for name, values in outcome.info.items():
        info[name], info[f"_{name}"] = values, done
    return {"final_obs": rows, "_final_obs": done, "final_info": info, "_final_info": done}
