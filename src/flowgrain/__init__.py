"""flowgrain: aligns flow-matching image models with human preferences, crediting the denoising step that earned the reward."""

from flowgrain.methods.algorithms import METHODS, Method
from flowgrain.config.recipes import recipe
from flowgrain.config.schema import Settings, SettingsError
from flowgrain.training.trainer import Interrupted, Run, RunStopped
from flowgrain.core.tree import Planner, Tree, cost

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "Interrupted",
    "Method",
    "Planner",
    "Run",
    "RunStopped",
    "Settings",
    "SettingsError",
    "Tree",
    "cost",
    "recipe",
]
