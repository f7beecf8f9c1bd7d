"""The Gymnasium skins: ``maskgym/Masking-v0`` alone and vectorised."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from backbones.errors import InputError, as_python
from envs.core import MaskingCore, Outcome, Slots


class MaskingEnv(gymnasium.Env[Any, np.ndarray]):
    """Answer one query under a plan within a budget.

    **Action.** ``MultiDiscrete([2] * (N + L*H + L), dtype=int8)``: keep (1) or drop (0) each visual token, then each
    head slot layer by layer, then each layer. A plan over budget is executed all the same; the reward sees it.

    **Observation.** A dict of ``budget`` (1,) in (0, 1] and the query: ``query`` (1,), its number in the bank, or with
    ``observation="features"`` ``visual`` (N, D), ``text`` (T, D) padded with zeros, and ``text_tokens`` (1,).

    **Reward.** By default accuracy minus 0.02 x the share of the full plan's LLM FLOPs spent; see ``envs.rewards``.

    **Episode.** One step, which terminates. ``info`` holds the raw terms: accuracy, log-likelihood, FLOPs by part,
    budget, kept tokens, heads and layers.

    **Arguments.** Those of ``envs.core.MaskingCore``; plain data all of them, so specs serialise.
    """

    metadata = {"render_modes": []}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None, **options: Any):
        if render_mode is not None:
            raise InputError(f"render_mode is {render_mode!r}; this environment renders nothing, use None")
        self.render_mode = None
        self.core = MaskingCore(**options)
        self.action_space = self.core.action_space
        self.observation_space = self.core.observation_space
        self._number, self._budget = 0, np.float32(1)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Draw a query and a budget; ``options={"query": number, "budget": share}`` fixes either."""
        super().reset(seed=seed)
        self._number, self._budget = self.core.draw(self.np_random)
        self._fix(**(options or {}))
        return self._observation(), {}

    def _fix(self, query: Any = None, budget: Any = None, **unknown: Any) -> None:
        """What the options of ``reset`` say.

        Raises:
            InputError: an unknown option, a query number that the source does not have, or a budget outside (0, 1].
        """
        if unknown:
            raise InputError(f"reset has no option {next(iter(unknown))!r}; it takes query and budget")
        query, budget = as_python(query), as_python(budget)
        if query is not None:
            if not isinstance(query, int) or not 0 <= query < len(self.core.source):
                raise InputError(f"query number {query} does not exist; the source has {len(self.core.source)} queries")
            self._number = int(query)
        if budget is not None:
            if not isinstance(budget, int | float | Decimal) or not 0 < budget <= 1:
                raise InputError(f"budget {budget} is no share of the full plan's LLM FLOPs, in (0, 1]")
            self._budget = np.float32(float(budget))

    def render(self) -> None:
        """Nothing: it has no render mode."""

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        outcome = self.core.step(np.array([self._number]), np.array([self._budget]), np.asarray(action)[None])
        info = {name: values[0].item() for name, values in outcome.info.items()}
        return self._observation(), float(outcome.rewards[0]), True, False, info

    def _observation(self) -> dict[str, np.ndarray]:
        batched = self.core.observe(np.array([self._number]), np.array([self._budget]))
        return {name: values[0] for name, values in batched.items()}


class MaskingVectorEnv(VectorEnv[Any, np.ndarray, np.ndarray]):
    """``MaskingEnv`` over ``num_envs`` slots: one batched call of the backbone a step.

    Autoreset is ``SAME_STEP``: the observation after a step is the next episode's, the last one is in
    ``infos["final_obs"]`` and the raw terms, arrays (num_envs,), in ``infos["final_info"]``.
    """

    metadata = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(self, num_envs: int = 1, plans_per_query: int = 1, render_mode: str | None = None, **options: Any):
        if render_mode is not None:
            raise InputError(f"render_mode is {render_mode!r}; this environment renders nothing, use None")
        self.render_mode = None
        self.core = MaskingCore(**options)
        self.slots = Slots(self.core, num_envs, plans_per_query)
        self.num_envs = num_envs
        self.single_action_space = self.core.action_space
        self.single_observation_space = self.core.observation_space
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.observation_space = batch_space(self.single_observation_space, num_envs)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        if options:
            raise InputError(f"reset has no option {next(iter(options))!r} in several environments; use MaskingEnv")
        if seed is not None or not self.slots.generators:
            self.slots.seed(seed)
        self.slots.draw()
        return self.slots.observe(), {}

    def render(self) -> None:
        """Nothing: it has no render mode."""

    def step(
        self, actions: np.ndarray
    ) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        last = self.slots.observe()
        outcome = self.slots.step(actions)
        self.slots.draw()
        done, never = np.ones(self.num_envs, bool), np.zeros(self.num_envs, bool)
        return self.slots.observe(), outcome.rewards, done, never, _final(last, outcome, done)


def _final(last: dict[str, np.ndarray], outcome: Outcome, done: np.ndarray) -> dict[str, Any]:
    """Infos in Gymnasium's vector form: arrays, each with a boolean ``_name`` beside it."""
    rows = np.empty(len(done), dtype=object)
    for row in range(len(done)):
        rows[row] = {name: values[row] for name, values in last.items()}
    info: dict[str, Any] = {}
    for name, values in outcome.info.items():
        info[name], info[f"_{name}"] = values, done
    return {"final_obs": rows, "_final_obs": done, "final_info": info, "_final_info": done}
