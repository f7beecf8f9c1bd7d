"""The batched environment core that all skins share: draw queries and budgets, execute plans, reward them.

Shape legend: B slots of the environment, N visual tokens, T text tokens, D hidden width, A flat action length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.utils import seeding
from torch import Tensor

from maskgym.backbones.backbone import Backbone
from maskgym.backbones.encodings.encoding import Encoding, EncodingBank, QuerySource
from maskgym.backbones.encodings.left_out import MAX_FAILED, LeftOut
from maskgym.backbones.latency_model import LatencyModel
from maskgym.backbones.loading.load import load_backbone
from maskgym.backbones.plans.masks import Masks
from maskgym.backbones.plans.survivors import Survivors
from maskgym.common.errors import InputError, as_python, check_count, printable
from maskgym.common.finite import check_finite
from maskgym.envs.data.answer_length import answer_cut
from maskgym.envs.data.queries import load_queries
from maskgym.envs.data.scoring import reference, score
from maskgym.envs.frames import frames
from maskgym.envs.resets import ResetNeeded, fixed, one_each
from maskgym.envs.reward_spec import WeightedReward
from maskgym.envs.rewards import Reward, RewardTerms

OBSERVATIONS = ("id", "features")
OVERFLOW = "look at its weights, or give --dtype a wider type"
MAX_TEXT_TOKENS = 64
"""Text tokens in a ``features`` observation; longer prompts are refused there."""


@dataclass(frozen=True)
class Outcome:
    """What one step brought: rewards (B,), and the raw terms of each row, all (B,)."""

    rewards: np.ndarray
    info: dict[str, np.ndarray]


class MaskingCore:
    """One-step episodes over a bank of queries, any number at once.

    Args:
        backbone: answers under the plans; a name, or one that is loaded.
        data: the queries; a name, a path, or a source.
        split: of the data.
        reward: a name, a dotted path, several with weights, or a function of ``RewardTerms``.
        budgets: each episode's budget is log-uniform between these two; see ``draw_budgets``.
        observation: ``"id"``: the query's number in the bank; ``"features"``: its visual tokens and text embeddings.
        controller_flops: what choosing a plan costs, charged to the budget: a number, or a function of the (B,)
            text tokens.
        max_new_tokens: answers are cut there; by default as ``maskgym.envs.data.answer_length.cut_of`` has it.
        latency_model: predicts prefill times, for rewards that ask for them.
        positions: how the kept tokens are laid out; see ``maskgym.backbones.plans.survivors``.
        merge: whether dropped tokens are averaged into kept ones.
        reward_seconds: that each reward may take for a batch; 0: any time.
        max_failed: share, in [0, 1), of the drawn queries that may fail, an unreadable image, say: each is named on
            standard error, and another query drawn in its place. Some may always, unless it is 0.

    Raises:
        InputError: an unknown name or path, a budget outside (0, 1], an unknown kind of observation.
    """

    def __init__(
        self,
        backbone: str | Backbone = "tiny",
        data: str | QuerySource = "easy-vqa",
        split: str = "train",
        reward: str | Sequence[str] | Reward = "accuracy-flops",
        budgets: Sequence[float] = (0.2, 1.0),
        observation: str = "id",
        controller_flops: int | Callable[[Tensor], Tensor] = 0,
        max_new_tokens: int | None = None,
        latency_model: LatencyModel | None = None,
        positions: str = "original",
        merge: bool = False,
        reward_seconds: float = 0,
        max_failed: float = MAX_FAILED,
    ):
        self.budgets = _bounds(budgets)
        if observation not in OBSERVATIONS:
            raise InputError(f"observation is {observation!r}; it must be one of {', '.join(OBSERVATIONS)}")
        self.reward = WeightedReward(reward, reward_seconds)
        self.backbone = load_backbone(backbone) if isinstance(backbone, str) else backbone
        self.source = load_queries(data, split) if isinstance(data, str) else data
        self.bank = EncodingBank(self.backbone, self.source)
        self.observation = observation
        self.controller_flops = controller_flops
        self.max_new_tokens = answer_cut(self.backbone, self.source, max_new_tokens)
        check_count("max_new_tokens", self.max_new_tokens)
        self.latency_model = latency_model
        self.layout = self.backbone.layout
        self.positions, self.merge = positions, merge
        Survivors.asked(0, positions, merge)  # checks
        self.left_out = LeftOut.of(self.bank, self._room, max_failed)
        self._rooms: dict[int, int] = {}

    @property
    def action_space(self) -> spaces.MultiDiscrete:
        """Two values a bit, as int64: agents add up ``nvec``, which int8 cannot hold."""
        return spaces.MultiDiscrete(np.full(self.layout.size, 2))

    @property
    def observation_space(self) -> spaces.Dict:
        budget = spaces.Box(0.0, 1.0, (1,), np.float32)
        if self.observation == "id":
            return spaces.Dict({"query": spaces.Box(0, max(1, len(self.source) - 1), (1,), np.int64), "budget": budget})
        limit = np.finfo(np.float32).max
        hidden = self.backbone.hidden
        return spaces.Dict(
            {
                "visual": spaces.Box(-limit, limit, (self.layout.tokens, hidden), np.float32),
                "text": spaces.Box(-limit, limit, (MAX_TEXT_TOKENS, hidden), np.float32),
                "text_tokens": spaces.Box(0, MAX_TEXT_TOKENS, (1,), np.int64),
                "budget": budget,
            }
        )

    def draw(self, rng: np.random.Generator) -> tuple[int, np.float32]:
        """A query number and a budget."""
        numbers, budgets = self.draw_each([rng])
        return int(numbers[0]), budgets[0]

    def draw_each(self, generators: Sequence[np.random.Generator]) -> tuple[np.ndarray, np.ndarray]:
        """A query number and a budget from each of G generators, both (G,). One that has drawn a query that fails
        draws both again.

        Raises:
            InputError: more queries fail than may.
        """
        budgets = np.ones(len(generators), np.float32)

        def draw(places: np.ndarray) -> list[int]:
            numbers = []
            for place in places:
                numbers.append(int(generators[place].integers(len(self.source))))
                budgets[place] = draw_budgets(generators[place], self.budgets)
            return numbers

        return self.left_out.draw(len(generators), draw), budgets

    def _room(self, number: int) -> int:
        """Tokens of the answer whose likelihood is measured behind a query's prompt.

        Raises:
            InputError: it has none; or the prompt is too long to be observed.
        """
        if number not in self._rooms:
            id, _, accepted = self.source.text(number)
            (ids,) = self.backbone.reference_ids([reference(accepted)], [id])
            if self.observation == "features":
                _check_observable(self.bank.gather([number]))
            self._rooms[number] = len(ids)
        return self._rooms[number]

    def observe(self, numbers: np.ndarray, budgets: np.ndarray) -> dict[str, np.ndarray]:
        """Observations of B slots, each entry (B, …), freshly allocated.

        Args:
            numbers: (B,) query numbers.
            budgets: (B,) budgets.
        """
        budget = budgets.astype(np.float32)[:, None]
        if self.observation == "id":
            return {"query": numbers.astype(np.int64)[:, None], "budget": budget}
        encoding = self.bank.gather(numbers)
        _check_observable(encoding)
        text = np.zeros((len(numbers), MAX_TEXT_TOKENS, self.backbone.hidden), np.float32)
        text_BTD = encoding.text_BTD * encoding.text_valid_BT[..., None]
        text[:, : text_BTD.shape[1]] = text_BTD.float().cpu().numpy()
        return {
            "visual": encoding.visual_BND.float().cpu().numpy(),
            "text": text,
            "text_tokens": encoding.text_tokens.cpu().numpy()[:, None],
            "budget": budget,
        }

    def step(self, numbers: np.ndarray, budgets: np.ndarray, actions: np.ndarray) -> Outcome:
        """Execute B plans in one batched call of the backbone.

        Args:
            numbers: (B,) query numbers.
            budgets: (B,) budgets.
            actions: (B, A) of 0 and 1.

        Raises:
            InputError: an action of another length, with other values or without a layer, or a reward that fails.
        """
        terms, parts = self.execute(numbers, budgets, actions)
        return Outcome(self.reward(terms, self.bank.ids(numbers)), {**terms.as_dict(), **parts})

    def execute(
        self, numbers: np.ndarray, budgets: np.ndarray, actions: np.ndarray
    ) -> tuple[RewardTerms, dict[str, np.ndarray]]:
        """What ``step`` does before it rewards: the raw terms, and the FLOPs part by part, each (B,).

        Raises:
            InputError: logits of the backbone that are not finite.
        """
        plans = self.layout.parse(actions).to(self.backbone.device)
        encoding = self.bank.gather(numbers)
        masks = self.backbone.restrict(encoding, self.laid_out(plans))
        references = [reference(accepted) for accepted in encoding.answers]
        answers = self.backbone.answer(encoding, masks, self.max_new_tokens, references)
        assert answers.log_likelihood is not None
        check_finite("the VLM's logits are", answers.log_likelihood, encoding.ids, OVERFLOW)
        charge = self.controller_flops
        charged = charge(encoding.text_tokens) if callable(charge) else charge
        cost = self.backbone.cost(encoding, masks, charged)
        full = self.backbone.full_llm_flops(encoding)
        terms = RewardTerms(
            accuracy=np.array([score(text, ok) for text, ok in zip(answers.texts, encoding.answers, strict=True)]),
            log_likelihood=_array(answers.log_likelihood),
            flops=_array(cost.llm / full),
            budget=budgets.astype(np.float64),
            kept_tokens=_array(masks.tokens.sum(1)),
            kept_heads=_array(masks.effective_heads.sum((1, 2))),
            kept_layers=_array(masks.layers.sum(1)),
            latency=self._latency(encoding, masks),
        )
        return terms, {f"flops_{name}": _array(getattr(cost, name)) for name in cost.__dataclass_fields__}

    def laid_out(self, plans: Masks) -> Masks:
        """The plans with the layout that was asked for."""
        survivors = Survivors.asked(len(plans), self.positions, self.merge, self.backbone.device)
        return replace(plans, survivors=survivors)

    def _latency(self, encoding: Encoding, masks: Masks) -> np.ndarray | None:
        """(B,) share of the full plan's predicted prefill time."""
        if self.latency_model is None:
            return None
        predict = partial(self.latency_model.predict, self.backbone, encoding)
        return _array(predict(masks) / predict(self.backbone.full(encoding)))


def _check_observable(encoding: Encoding) -> None:
    """Refuse prompts that an observation cannot hold.

    Raises:
        InputError: naming the longest.
    """
    if encoding.text_BTD.shape[1] > MAX_TEXT_TOKENS:
        longest = encoding.ids[int(encoding.text_tokens.argmax())]
        raise InputError(
            f"the prompt of query {longest!r} has {encoding.text_BTD.shape[1]} text tokens; a features observation "
            f"holds {MAX_TEXT_TOKENS}: shorten the question, or use observation='id'"
        )


def _bounds(budgets: Any) -> tuple[float, float]:
    """Two budgets as floats; arrays, tensors and generators of two are taken, too.

    Raises:
        InputError: something else, or a pair out of order or outside (0, 1].
    """
    try:
        low, high = map(as_python, () if isinstance(budgets, Set | Mapping) else budgets)
        if 0 < low <= high <= 1:
            return float(low), float(high)
    except (TypeError, ValueError, RuntimeError):  # no pair, or no numbers
        pass
    shown = printable(f"{budgets!r:.80}")
    raise InputError(f"budgets are {shown}; give a lower and an upper bound with 0 < lower <= upper <= 1")


def draw_budgets(rng: Any, bounds: Sequence[float], count: int | None = None) -> Any:
    """Budgets whose logarithm is uniform between the bounds: half of them lie below the geometric mean, for most is to
    be learned where little may be spent.

    Args:
        rng: a NumPy generator, or NumPy's global one.
        bounds: shares, the lower first.
        count: how many, as an array; None: one number.
    """
    return np.exp(rng.uniform(*np.log(bounds), count))


def _array(values: Tensor) -> np.ndarray:
    return values.double().cpu().numpy()


class Slots:
    """The running episodes of a batched environment: B query numbers and budgets.

    Slot i draws from its own generator, so it sees what a scalar environment with the same seed sees. Slots of one
    group of ``plans_per_query`` share a draw: the same query and budget, to be answered under several plans.

    Args:
        core: draws.
        count: B, the slots.
        plans_per_query: size of a group; must divide ``count``.

    Attributes:
        running: whether the slots have episodes that the next step answers.
        executed: query numbers (B,) and flat actions (B, A) of the last step since ``reset``.
    """

    def __init__(self, core: MaskingCore, count: int, plans_per_query: int = 1):
        if count < 1 or plans_per_query < 1 or count % plans_per_query:
            raise InputError(
                f"{count} environments do not divide into groups of {plans_per_query} plans a query; "
                "choose a multiple of it"
            )
        self.core, self.count, self.plans_per_query = core, count, plans_per_query
        self.numbers = np.zeros(count, np.int64)
        self.budgets = np.ones(count, np.float32)
        self.generators: list[np.random.Generator] = []
        self.running = False
        self.executed: tuple[np.ndarray, np.ndarray] | None = None

    def seed(self, seed: int | Sequence[int | None] | None) -> None:
        """Group i gets seed + i, or its slots' own of a list (B,); without a seed it goes on, at first with fresh
        entropy.

        Raises:
            InputError: a list of another length, or with different seeds in a group.
        """
        groups = self.count // self.plans_per_query
        if isinstance(seed, int):
            seeds: list[int | None] = [seed + group for group in range(groups)]
        else:
            seeds = one_each("the seed", seed, self.count)
            self._check_groups("seeds", np.array(seeds, object))
            seeds = seeds[:: self.plans_per_query]
        kept = self.generators
        self.generators = [
            kept[group] if kept and each is None else seeding.np_random(each)[0] for group, each in enumerate(seeds)
        ]

    def reset(self, seed: int | Sequence[int | None] | None, options: Sequence[Any]) -> None:
        """Begin new episodes, whose queries or budgets may be given: see ``maskgym.envs.resets``.

        Args:
            seed: see ``seed``.
            options: (B,) dicts or None, one a slot.
        """
        given = [fixed(each, len(self.core.source)) for each in options]
        self.seed(seed)
        self.draw()
        for slot, (number, budget) in enumerate(given):
            if number is not None:
                self.numbers[slot] = number
            if budget is not None:
                self.budgets[slot] = budget
        self._check_groups("queries", self.numbers)
        self._check_groups("budgets", self.budgets)
        self.executed = None

    def draw(self) -> None:
        """New queries and budgets in every slot, in fresh arrays."""
        numbers, budgets = self.core.draw_each(self.generators)
        self.numbers = np.repeat(numbers, self.plans_per_query)
        self.budgets = np.repeat(budgets, self.plans_per_query)
        self.running = True

    def observe(self) -> dict[str, np.ndarray]:
        return self.core.observe(self.numbers, self.budgets)

    def step(self, actions: np.ndarray) -> Outcome:
        """Answer the episodes, which ends them.

        Raises:
            ResetNeeded: there are none.
        """
        if not self.running:
            raise ResetNeeded("step()")
        outcome = self.core.step(self.numbers, self.budgets, actions)
        self.running, self.executed = False, (self.numbers, np.asarray(actions))
        return outcome

    def render(self) -> list[np.ndarray]:
        """A frame of each slot: what its last step showed the language model of the image; before it, all.

        Raises:
            ResetNeeded: there was no episode yet.
        """
        if self.executed is not None:
            return frames(self.core.bank, self.executed[0], self.core.layout.parse(self.executed[1]).tokens)
        if not self.running:
            raise ResetNeeded("render()")
        return frames(self.core.bank, self.numbers, self.core.layout.full(self.count).tokens)

    def close(self) -> None:
        """End the episodes; ``reset`` begins new ones."""
        self.running, self.executed = False, None

    def _check_groups(self, what: str, values: np.ndarray) -> None:
        """Refuse what differs between slots that share a draw."""
        groups = values.reshape(-1, self.plans_per_query)
        if (groups != groups[:, :1]).any():
            self.running = False
            raise InputError(
                f"the {what} differ within a group of {self.plans_per_query} slots, which answer the same query under "
                "the same budget; give the slots of a group the same"
            )
