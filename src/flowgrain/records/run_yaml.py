"""Reading of run.yaml: settings, versions and arguments of a run."""

from pathlib import Path
from typing import Any

from flowgrain.settings import SettingsError
from flowgrain.yaml_file import read_mapping


def read_run(path: Path) -> dict[str, Any]:
    """The content of a run's run.yaml.

    Args:
        path: directory of the run, or its run.yaml.

    Raises:
        SettingsError: there is no readable run.yaml.
    """
    if path.is_file() and path.suffix not in (".yaml", ".yml"):
        raise SettingsError(f"{path}: not the directory of a run. It is a file.")
    file = path / "run.yaml" if path.is_dir() else path
    if not file.exists():
        raise SettingsError(f"{path}: not the directory of a run. It has no run.yaml.")
    return read_mapping(file)
