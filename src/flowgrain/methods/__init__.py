"""Training methods, one file each. Importing this package registers the built-in methods."""

import importlib
import pkgutil

from flowgrain.methods.base import (
    METHODS,
    ForwardProcess,
    Method,
    PolicyGradient,
    build_method,
    register,
)
from flowgrain.methods.cost import plan_tree, price

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "METHODS",
    "ForwardProcess",
    "Method",
    "PolicyGradient",
    "build_method",
    "plan_tree",
    "price",
    "register",
]
