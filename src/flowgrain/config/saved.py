"""The settings in the run.yaml of a run, also of an earlier version."""

import importlib.metadata
from pathlib import Path
from typing import Any

from flowgrain.settings import SettingsError


def saved_settings(saved: dict[str, Any], file: Path) -> dict[str, Any]:
    """The settings in a run's run.yaml.

    Raises:
        SettingsError: another version of flowgrain wrote the file, or it contains no settings.
    """
    version_now = importlib.metadata.version("flowgrain")
    if "config" not in saved:
        versions = saved.get("versions")
        version = versions.get("flowgrain") if isinstance(versions, dict) else None
        if "settings" in saved:
            raise SettingsError(
                f"{file}: written by flowgrain {version or '0.1'}, and not readable by flowgrain "
                f"{version_now}. Install flowgrain=={version or '0.1'}, or start a new run."
            )
        raise SettingsError(f"{file}: contains no settings of a run.")
    config = saved["config"]
    if not isinstance(config, dict):
        raise SettingsError(f"{file}: `config` is not a mapping of sections.")
    runtime = config.get("runtime")
    if isinstance(runtime, dict) and "loggers" in runtime:  # the former name
        runtime = {"trackers": runtime["loggers"]} | runtime
        del runtime["loggers"]
        config = config | {"runtime": runtime}
    return config
