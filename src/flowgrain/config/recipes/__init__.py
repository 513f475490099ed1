"""Recipes: a run a file. A recipe is a module whose function `recipe()` returns the settings that it sets.

Those of real models are flux_METHOD and sd35_METHOD; with _lora behind its name a recipe is fitted to one 80 GB GPU.
"""

import difflib
import importlib
import pkgutil
import runpy
from pathlib import Path
from typing import Any

from flowgrain.methods.algorithms import METHODS
from flowgrain.config.recipes._models import FLUX, SD35, one_gpu
from flowgrain.training.recorder import read_settings
from flowgrain.config.schema import Settings, SettingsError, canonical, settings

DEFAULT = "demo"


LORA = "_lora"
MODELS = {"flux": FLUX, "sd3": SD35}
"""What the recipes of a real model share, by its backbone."""


def bundled() -> list[str]:
    """Names of the recipes in the package."""
    files = sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    return [name for file in files for name in ((file,) if file == DEFAULT else (file, file + LORA))]


def recipe(name: str = DEFAULT, /, **changes: Any) -> Settings:
    """The settings that `name` stands for, with `changes`.

    name: a bundled recipe; a method, which then runs on the bundled model as its paper sets it; the path of a recipe file
    (.py with a function `recipe`, or .yaml); or a run's folder. Raises SettingsError naming what is wrong and what is near.
    """
    if name in bundled():
        found = importlib.import_module(f"{__name__}.{name.removesuffix(LORA)}").recipe()
        return settings({"name": name, **(one_gpu(found) if name.endswith(LORA) else found), **changes})
    if canonical(name) in METHODS:
        return settings({"name": canonical(name), "method": name, **changes})
    path = Path(name).expanduser()
    if path.suffix == ".py" and path.is_file():
        function = runpy.run_path(str(path)).get("recipe")
        if not callable(function):
            raise SettingsError(f"{path}: a recipe file defines a function `recipe()` that returns a dict of settings")
        found = function()
        if not isinstance(found, dict):
            raise SettingsError(f"{path}: recipe() returned {type(found).__name__}; it returns a dict of settings")
        return settings({"name": path.stem, **found, **changes})
    if path.exists():
        return read_settings(path, **changes)
    known = [*bundled(), *METHODS]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}, or the path of a recipe file or a run"
    raise SettingsError(f"RECIPE={name}: there is no such recipe, method, file or run; {hint}")
