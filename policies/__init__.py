"""The two-level controller, what trains it, what makes its plans fit, and the baselines."""

from maskgym.policies.baselines import BASELINES, Planner, random_plans
from maskgym.policies.controller import ControllerConfig, TwoLevelController
from maskgym.policies.learned import ControllerPlanner, load_controller, save_controller
from maskgym.policies.projection import project

__all__ = [
    "BASELINES",
    "ControllerConfig",
    "ControllerPlanner",
    "Planner",
    "TwoLevelController",
    "load_controller",
    "project",
    "random_plans",
    "save_controller",
]
