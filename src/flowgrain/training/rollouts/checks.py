"""Checks of the settings of rollout workers in the process that trains, and the import of Ray."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flowgrain.distributed import env_rank
from flowgrain.settings import SettingsError

if TYPE_CHECKING:
    from flowgrain.config.schema import Config


def import_ray(config: Config) -> Any:
    """The module `ray`, configured to send no usage statistics.

    Raises:
        SettingsError: it is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if config.rollout.address is None and "ray" not in sys.modules:
        # Ray reads this when it is imported, and its processes must agree with this process.
        # Without it, Ray listens on all network interfaces.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
    except ImportError as error:
        raise SettingsError(
            f"rollout.workers={config.rollout.workers}: Ray is not installed ({error}). "
            "Run pip install 'flowgrain[ray]', or use rollout.workers=0."
        ) from error
    return ray


def check_workers(config: Config, given: Sequence[str]) -> None:
    """Check that workers can be used in this process, before a model is loaded.

    Args:
        config: settings of the run.
        given: names of the Trainer's arguments that replace settings.

    Raises:
        SettingsError: they cannot.
    """
    workers, ranks = config.rollout.workers, env_rank()[1]
    if not workers:
        return
    if ranks > 1:
        raise SettingsError(
            f"rollout.workers={workers}: only one training process is supported, but torchrun "
            f"started {ranks}. Start one process, or use rollout.workers=0."
        )
    for name in given:
        if name in ("rewards", "method", "backbone"):
            raise SettingsError(
                f"rollout.workers={workers}: a worker cannot use the argument {name} of the "
                "Trainer, because it builds its parts from the settings. Register the object in a "
                "file of runtime.plugins and name it in the settings, or use rollout.workers=0."
            )
    import_ray(config)
