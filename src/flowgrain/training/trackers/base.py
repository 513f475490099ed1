"""The interface of a tracker, and the data that a tracker receives.

Shapes: I images of H x W pixels.
"""

import importlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from flowgrain.records.images import Pixels
from flowgrain.settings import SettingsError

TRACKERS = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}
"""The module of every tracker by name."""
PROJECT = "flowgrain"
"""Project of the runs in wandb and Trackio."""


@dataclass(frozen=True)
class TrackedRun:
    """The run that a tracker follows.

    Attributes:
        folder: directory of the run.
        id: identity of the run. A resumed run keeps it, and no other run has it.
        config: settings as nested plain values.
        first_step: first step that a resumed run writes again. None: a new run.
    """

    folder: Path
    id: str
    config: Mapping[str, Any]
    first_step: int | None

    @property
    def name(self) -> str:
        """Name of the directory."""
        return self.folder.resolve().name


@dataclass(frozen=True)
class ImageTable:
    """Images with their values.

    Attributes:
        step: training step.
        images: I images [H, W, 3] of equal size.
        columns: I values by name: "prompt" a text, others numbers or None.
    """

    step: int
    images: list[Pixels]
    columns: dict[str, list[Any]]

    @property
    def rows(self) -> list[list[Any]]:
        """The values of every image."""
        return [list(values) for values in zip(*self.columns.values(), strict=True)]


class Tracker(Protocol):
    """Writes copies of a run's records with a library. Any call may raise any error."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log finite numbers by name."""

    def images(self, name: str, table: ImageTable) -> None:
        """Log a table of images under `name`: "evaluation" or "group"."""

    def alarm(self, step: int, title: str, message: str) -> None:
        """Log an alarm of a monitor."""

    def artifact(self, folder: Path) -> None:
        """Log the exported parameters in `folder`."""

    def close(self) -> None:
        """Write everything. The tracker is not used afterwards."""


def import_library(name: str) -> Any:
    """The module of the tracker `name`.

    Raises:
        ImportError: it is not installed.
    """
    if name == "wandb":  # it reports its errors and its usage to its makers, in offline mode too
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    return importlib.import_module(TRACKERS[name])


def wandb_mode() -> str:
    """The mode of wandb: offline, unless the user has set another mode."""
    return os.environ.get("WANDB_MODE", "offline")


def check_installed(name: str) -> None:
    """Check that the library of the tracker `name` can be imported.

    Raises:
        SettingsError: it cannot.
    """
    try:
        import_library(name)
    except ImportError as error:
        raise SettingsError(
            f"runtime.trackers: {name} is not installed ({error}). Run pip install {name}."
        ) from error


def finite(values: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers among `values`, without the step."""
    return {
        name: float(value)
        for name, value in values.items()
        if name != "step" and value is not None and math.isfinite(value)
    }
