"""Post-train flow-matching image models with reinforcement learning and step-level credit."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowgrain.config import Config, load_config
    from flowgrain.core.cost import cost
    from flowgrain.core.tree import Planner, Tree
    from flowgrain.data import Prompt
    from flowgrain.methods import (
        METHODS,
        ForwardProcess,
        Method,
        PolicyGradient,
        RewardGradient,
        register,
    )
    from flowgrain.models import register_backbone
    from flowgrain.records import load_run
    from flowgrain.rewards import register_reward
    from flowgrain.settings import SettingsError
    from flowgrain.training import Interrupted, RunStopped, Trainer

__version__ = "0.2.0"

_HOMES = {
    "METHODS": "methods",
    "Config": "config",
    "ForwardProcess": "methods",
    "Interrupted": "training",
    "Method": "methods",
    "Planner": "core.tree",
    "PolicyGradient": "methods",
    "Prompt": "data",
    "RewardGradient": "methods",
    "RunStopped": "training",
    "SettingsError": "settings",
    "Trainer": "training",
    "Tree": "core.tree",
    "cost": "core.cost",
    "load_config": "config",
    "load_run": "records",
    "register": "methods",
    "register_backbone": "models",
    "register_reward": "rewards",
}
# Imported on first use: a command that only reads settings does not need to import diffusers.


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'flowgrain' has no attribute {name!r}")
    return getattr(importlib.import_module(f"flowgrain.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


__all__ = [
    "METHODS",
    "Config",
    "ForwardProcess",
    "Interrupted",
    "Method",
    "Planner",
    "PolicyGradient",
    "Prompt",
    "RewardGradient",
    "RunStopped",
    "SettingsError",
    "Trainer",
    "Tree",
    "cost",
    "load_config",
    "load_run",
    "register",
    "register_backbone",
    "register_reward",
]
