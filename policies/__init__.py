"""The two-level controller, what trains it, what makes its plans fit, and the baselines."""

from maskgym.policies.baselines import BASELINES, random_plans
from maskgym.policies.controller.learned import ControllerPlanner, load_controller, save_controller
from maskgym.policies.controller.network import ControllerConfig, TwoLevelController
from maskgym.policies.planner import Planner, PlannerWrapper
from maskgym.policies.planning.projection import project

__all__ = [
    "BASELINES",
    "ControllerConfig",
    "ControllerPlanner",
    "Planner",
    "PlannerWrapper",
    "TwoLevelController",
    "load_controller",
    "project",
    "random_plans",
    "save_controller",
]
