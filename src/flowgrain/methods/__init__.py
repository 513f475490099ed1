"""Training methods, one file each. Importing this package registers the built-in methods."""

import importlib
import pkgutil

from flowgrain.methods.base import (
    METHODS,
    LearningRates,
    Method,
    Observation,
    build_method,
    register,
)
from flowgrain.methods.cost import plan_tree, price
from flowgrain.methods.forward_process import ForwardProcess
from flowgrain.methods.policy_gradient import PolicyGradient
from flowgrain.methods.repair import Repair
from flowgrain.methods.reward_gradient import DifferentiableReward, RewardGradient

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "METHODS",
    "DifferentiableReward",
    "ForwardProcess",
    "LearningRates",
    "Method",
    "Observation",
    "PolicyGradient",
    "Repair",
    "RewardGradient",
    "build_method",
    "plan_tree",
    "price",
    "register",
]
