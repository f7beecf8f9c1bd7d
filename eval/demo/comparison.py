"""One query under several policies, with what each kept and how long it took."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from threading import Lock

from maskgym.backbones.backbone import Backbone
from maskgym.backbones.encodings.encoding import Query
from maskgym.common.errors import InputError
from maskgym.eval.measure.latency import measure
from maskgym.eval.measure.plan_pictures import plan_png
from maskgym.eval.policies import load_planner
from maskgym.policies.baselines import BASELINES
from maskgym.policies.planner import Planner
from maskgym.policies.wrappers.replies import Planned, Reply

FULL = "full"
REPEATS, WARM_UP = 3, 1
"""Timed rounds of a query, and those before them."""
REMEMBERED = 256


@dataclass(frozen=True)
class Side:
    """What one policy did.

    Attributes:
        reply: the answer and what it took.
        visual_tokens: that the image has.
        picture: PNG of the tokens and heads kept.
        ttft_ms: milliseconds to the first token, image and controller included, median.
    """

    reply: Reply
    visual_tokens: int
    picture: bytes
    ttft_ms: float


class Comparison:
    """The plain model, a policy, and baselines, asked one query at a time, so that times mean something.

    Args:
        policy: a run folder, or any policy of the command line.
        backbone: answers.
        seed: of baselines that draw.
        max_new_tokens: answers are cut there.

    Raises:
        InputError: an unknown policy, or a controller for another backbone.
    """

    def __init__(self, policy: str, backbone: Backbone, seed: int = 0, max_new_tokens: int = 32):
        self.backbone, self.max_new_tokens = backbone, max_new_tokens
        self.policy = load_planner(policy, backbone, seed)
        self.full = load_planner(FULL, backbone, seed)
        self.baselines = _loadable(set(BASELINES) - {FULL}, backbone, seed)
        self._sides: OrderedDict[Hashable, Side] = OrderedDict()
        self._one_by_one = Lock()

    def side(self, planner: Planner, query: Query, budget: float) -> Side:
        """What a policy does with a query; equal calls are answered from memory.

        Args:
            planner: ``full``, ``policy`` or one of ``baselines``.
            query: with an ``image_key``.
            budget: share of the full plan's LLM FLOPs, for a policy that follows budgets.

        Raises:
            InputError: a query that fails, or a budget below the cost of the smallest plan.
        """
        budget = budget if planner.budgeted else 1.0
        key = (id(planner), query.image_key, query.question, budget)
        with self._one_by_one:
            if key not in self._sides:
                self._sides[key] = self._ask(planner, query, budget)
            self._sides.move_to_end(key)
            while len(self._sides) > REMEMBERED:
                self._sides.popitem(last=False)
            return self._sides[key]

    def _ask(self, planner: Planner, query: Query, budget: float) -> Side:
        planned = Planned.of(planner, self.backbone, [query], [budget])
        (reply,) = planned.answer(self.max_new_tokens)
        there_N = planned.encoding.visual_valid_BN[0].cpu()
        tokens_n = reply.plan.tokens[0, there_N].numpy()
        picture = plan_png(query.image, tokens_n, reply.plan.effective_heads[0].numpy())
        latency = measure(self.backbone, planner, [[query]], budget, new_tokens=1, repeats=REPEATS, warm_up=WARM_UP)
        return Side(reply, len(tokens_n), picture, latency.ttft.p50)


def _loadable(names: Sequence[str] | set[str], backbone: Backbone, seed: int) -> dict[str, Planner]:
    """Those of the baselines that need nothing more and suit the backbone."""
    planners = {}
    for name in sorted(names, key=list(BASELINES).index):
        try:
            planners[name] = load_planner(name, backbone, seed)
        except InputError:  # a searched plan without its file, a signal that the tower lacks
            continue
    return planners
