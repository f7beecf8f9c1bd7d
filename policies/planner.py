"""What chooses plans, and what stands around it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor

from maskgym.backbones.encodings.encoding import Encoding
from maskgym.backbones.plans.masks import Masks


class Planner(ABC):
    """Whatever chooses plans: a baseline, or a trained controller.

    A plan may also say which tokens leave inside the decoder, by scores taken there (``Masks.stages``), how the kept
    ones are laid out or rewritten (``Masks.survivors``), and what making it cost (``Masks.making``).

    Attributes:
        name: how it is called in records.
        budgeted: whether it follows the budget; if not, it is evaluated once, at budget 1.
        signals: what it reads of the vision tower (``maskgym.backbones.encodings.saliency.SIGNALS``).
        notes: entries for its records.
    """

    name: str
    budgeted: bool = True
    signals: tuple[str, ...] = ()
    notes: Mapping[str, Any] = MappingProxyType({})

    @abstractmethod
    def plan(self, encoding: Encoding, budgets_B: Tensor) -> Masks:
        """Plans for B queries.

        Args:
            encoding: the queries.
            budgets_B: share of the full plan's LLM FLOPs that each may spend, in (0, 1].
        """

    def controller_flops(self, encoding: Encoding) -> int | Tensor:
        """FLOPs of choosing a plan that every query takes alike, one number or (B,); charged to the budget."""
        return 0

    def planning_flops(self, encoding: Encoding) -> int | Tensor:
        """The part of ``controller_flops`` that each call of ``plan`` takes, whether or not the plan is run."""
        return self.controller_flops(encoding)


class PlannerWrapper(Planner):
    """A planner around another, as ``gymnasium.Wrapper`` is to environments: the other's members but for those that a
    subclass replaces.

    Args:
        planner: the other; ``adopted``.

    Attributes:
        planner: the other.
    """

    def __init__(self, planner: Planner):
        self.planner = adopted(planner)
        self.name, self.budgeted = self.planner.name, self.planner.budgeted
        self.signals, self.notes = self.planner.signals, self.planner.notes

    def plan(self, encoding: Encoding, budgets_B: Tensor) -> Masks:
        return self.planner.plan(encoding, budgets_B)

    def controller_flops(self, encoding: Encoding) -> int | Tensor:
        return self.planner.controller_flops(encoding)

    def planning_flops(self, encoding: Encoding) -> int | Tensor:
        return self.planner.planning_flops(encoding)


class _Adopted(Planner):
    """An object that is no ``Planner`` but plans; of the members that it lacks it has the defaults.

    Args:
        planner: the object.
    """

    MEMBERS = ("name", "budgeted", "signals", "notes", "controller_flops", "planning_flops")

    def __init__(self, planner: Any):
        self.planner = planner
        vars(self).update({member: getattr(planner, member) for member in self.MEMBERS if hasattr(planner, member)})

    def plan(self, encoding: Encoding, budgets_B: Tensor) -> Masks:
        return self.planner.plan(encoding, budgets_B)


def adopted(planner: Any) -> Planner:
    """A planner with all members, made of a planner or of an object that has ``name`` and ``plan`` at least."""
    return planner if isinstance(planner, Planner) else _Adopted(planner)
