"""The two-level controller as a Stable-Baselines3 actor-critic policy.

The backbone is not a sub-module: its weights are neither trained nor saved here. Observations hold query numbers, which
are looked up in the bank, so the rollout buffer stores a number, a budget and int8 bits a transition.

Shape legend: B rows, A flat action length, K probability ratios of a plan.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn
from torch import Tensor, nn

from maskgym.backbones.backbone import Backbone
from maskgym.backbones.encodings.encoding import EncodingBank
from maskgym.backbones.plans.masks import MaskLayout
from maskgym.common.errors import InputError, queries_named
from maskgym.common.finite import refuse_bad_gradients
from maskgym.policies.controller.decisions import Budgeted, Decider, Decisions
from maskgym.policies.controller.network import ControllerConfig, TwoLevelController

RATIOS = ("joint", "level", "axis", "bit")
"""PPO clips the ratio of new to old probability. ``joint``: of the whole plan, which leaves the clip range at once when
a plan has many bits; ``level``: of tokens, and of heads and layers given them; ``axis``: of each dimension; ``bit``."""


def ratio_sizes(ratios: str, layout: MaskLayout) -> list[int]:
    """How many bits of the flat action share each ratio; the ratios' number is K.

    Raises:
        InputError: an unknown kind.
    """
    llm = layout.layers * layout.heads + layout.layers
    kinds = {
        "joint": [layout.size],
        "level": [layout.tokens, llm],
        "axis": [layout.tokens, layout.layers * layout.heads, layout.layers],
        "bit": [1] * layout.size,
    }
    if ratios not in kinds:
        raise InputError(f"the ratios are {ratios!r}; they must be one of {', '.join(RATIOS)}")
    return kinds[ratios]


class _Forward(NamedTuple):
    """What the last ``forward`` computed, by all that it was computed from: see ``TwoLevelPolicy.fitted``."""

    key: tuple[bytes | int, ...]
    read: Budgeted
    decisions: Decisions


class TwoLevelPolicy(ActorCriticPolicy):
    """Autoregressive over the two levels: tokens, then heads and layers given the tokens kept and the budget left.

    Args:
        observation_space: of ``MaskingCore``.
        action_space: the flat action.
        lr_schedule: learning rate by remaining progress.
        bank: the queries' encodings; its encoder is the backbone.
        controller: sizes of the controller.
        ratios: which bits share one probability ratio in PPO's objective: see ``RATIOS``.
        **options: SB3's own: ``optimizer_class``, ``optimizer_kwargs``.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule: Schedule,
        bank: EncodingBank,
        controller: ControllerConfig,
        ratios: str = "joint",
        **options: Any,
    ):
        assert isinstance(bank.encoder, Backbone)
        self.bank = bank
        self.backbone = bank.encoder
        self.controller_config = controller
        self.ratio_sizes = ratio_sizes(ratios, self.backbone.layout)
        super().__init__(observation_space, action_space, lr_schedule, **options)

    def _build(self, lr_schedule: Schedule) -> None:
        config = self.controller_config
        self.controller = TwoLevelController(config)
        self.critic = nn.Sequential(nn.Linear(config.width, config.width), nn.Tanh(), nn.Linear(config.width, 1))
        self.decider = Decider(self.controller, self.backbone)
        self._last: _Forward | None = None
        self.optimizer = self.optimizer_class(self.parameters(), **{"lr": lr_schedule(1), **self.optimizer_kwargs})
        refuse_bad_gradients(self.optimizer, lambda: f"in a minibatch ({queries_named(self._ids)})")

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Actions (B, A), values (B, 1) and log-probabilities (B, K), one for every ratio."""
        read = self._read(obs)
        decisions = self.decider.decide(read, sample=not deterministic)
        self._last = _Forward(self._key(obs, decisions.bits_BA), read, decisions)
        return decisions.bits_BA.to(torch.int8), self._values(read), self._log_probs(decisions)

    def evaluate_actions(self, obs: PyTorchObs, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values (B, 1), log-probabilities (B, K) and mean entropy per decision (B,)."""
        read = self._read(obs)
        decisions = self.decider.review(read, actions.bool())
        # Per decision, so that an entropy coefficient means the same for 94 decisions and for 1,632.
        entropy_B = decisions.entropy() / decisions.free_BA.sum(1)
        return self._values(read), self._log_probs(decisions), entropy_B

    def predict_values(self, obs: PyTorchObs) -> Tensor:
        return self._values(self._read(obs))

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> Tensor:
        """Actions that fit their budgets."""
        read = self._read(observation)
        decider = self.decider
        masks = decider.plan(read) if deterministic else decider.fit(read, decider.decide(read, sample=True))
        return self.backbone.layout.flatten(masks).to(torch.int8)

    def get_distribution(self, obs: PyTorchObs) -> Distribution:
        raise TypeError("the two levels have no joint factorised distribution; use forward or evaluate_actions")

    @torch.no_grad()
    def fitted(self, observation: VecEnvObs, actions: np.ndarray) -> np.ndarray:
        """Actions projected into their budgets, (B, A) int8: what is executed.

        A function of its arguments and the weights, whatever else the policy has computed. In a rollout they are those
        of the last ``forward``, whose reading and logits are then not computed again.

        Args:
            observation: that the actions answer.
            actions: (B, A) of 0 and 1, sampled or not.

        Raises:
            InputError: an action without a layer or without a protected one, or a budget below the smallest plan's
                cost.
        """
        assert isinstance(observation, dict)
        obs = obs_as_tensor(observation, self.device)
        bits_BA = torch.as_tensor(actions, device=self.device).bool()
        if self._last is not None and self._last.key == self._key(obs, bits_BA):
            _, read, decisions = self._last
        else:
            read = self._read(obs)
            decisions = self.decider.review(read, bits_BA)
        masks = self.decider.fit(read, decisions)
        return self.backbone.layout.flatten(masks).cpu().numpy().astype(np.int8)

    def _key(self, obs: PyTorchObs, bits_BA: Tensor) -> tuple[bytes | int, ...]:
        """Equal where observation, actions and weights are: torch counts every change of a weight in place."""
        assert isinstance(obs, dict)
        given = (obs["query"], obs["budget"], bits_BA)
        changes = (parameter._version for parameter in self.parameters())
        return *(part.cpu().numpy().tobytes() for part in given), *changes

    def _log_probs(self, decisions: Decisions) -> Tensor:
        parts = decisions.log_prob_of_bits().split(self.ratio_sizes, dim=1)
        return torch.stack([part.sum(1) for part in parts], dim=1)

    def _values(self, read: Budgeted) -> Tensor:
        return self.critic(read.reading.context_BW)

    def _read(self, obs: PyTorchObs) -> Budgeted:
        assert isinstance(obs, dict)
        encoding = self.bank.gather(obs["query"][:, 0].long().cpu().numpy())
        self._ids = encoding.ids
        return self.decider.read(encoding, obs["budget"][:, 0])


class FittedVecEnv(VecEnvWrapper):
    """Executes what it is given after projection into the budget; the buffer keeps what was sampled.

    The projection is then part of the environment that the policy learns in, and no over-budget penalty is needed.

    Args:
        venv: the environment.

    Attributes:
        policy: whose logits say which units go first; to be set before the first step.
    """

    policy: TwoLevelPolicy

    def __init__(self, venv: VecEnv):
        super().__init__(venv)
        self._observation: VecEnvObs | None = None

    def reset(self) -> VecEnvObs:
        self._observation = self.venv.reset()
        return self._observation

    def step_async(self, actions: np.ndarray) -> None:
        if self._observation is None:
            raise InputError("step() needs an episode, and none is running: call reset() first")
        self.venv.step_async(self.policy.fitted(self._observation, actions))

    def step_wait(self) -> VecEnvStepReturn:
        self._observation, rewards, dones, infos = self.venv.step_wait()
        return self._observation, rewards, dones, infos

    def load_state(self, state: dict[str, Any]) -> dict[str, np.ndarray]:
        """Continue from a state of the environment's; returns the observation that the next action answers."""
        venv: Any = self.venv
        observation: dict[str, np.ndarray] = venv.load_state(state)
        self._observation = observation
        return observation
