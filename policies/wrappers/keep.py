"""A fixed share of the visual tokens in place of a budget, for any rule that chooses tokens by count."""

from __future__ import annotations

from torch import Tensor

from maskgym.backbones.encodings.encoding import Encoding
from maskgym.backbones.plans.masks import Masks
from maskgym.common.errors import InputError
from maskgym.policies.planner import Planner, PlannerWrapper
from maskgym.policies.static.counts import CountPlanner


def check_share(share: float) -> None:
    """Refuse what is no share of the visual tokens.

    Raises:
        InputError: a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise InputError(f"a share of {share:g} of the visual tokens is outside (0, 1]; give one such as 0.25")


class KeepPlanner(PlannerWrapper):
    """Keeps a share of each image's visual tokens, whatever the budget.

    Args:
        planner: chooses which.
        share: in (0, 1]; for rules with several stages inside the decoder the mean over layers.

    Raises:
        InputError: a planner that does not choose tokens by count, or a share outside (0, 1].
    """

    def __init__(self, planner: Planner, share: float):
        if not isinstance(planner, CountPlanner) or not planner.budgeted:
            raise InputError(
                f"policy {planner.name!r} does not choose visual tokens by count, so it cannot be told to keep a share "
                "of them; give it budgets"
            )
        check_share(share)
        super().__init__(planner)
        self.rule, self.share, self.budgeted = planner, share, False
        self.notes = {**self.notes, "keep": share}

    def plan(self, encoding: Encoding, budgets_B: Tensor) -> Masks:
        return self.rule.plan_counts(encoding, self.rule.shares(encoding, self.share))
