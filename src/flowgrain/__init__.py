"""flowgrain: aligns flow-matching image models with human preferences, crediting the denoising step that earned the reward."""

from flowgrain.algorithms import METHODS, Method
from flowgrain.recipes import recipe
from flowgrain.settings import Settings, SettingsError
from flowgrain.train import Interrupted, Run, RunStopped
from flowgrain.tree import Planner, Tree, cost

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
