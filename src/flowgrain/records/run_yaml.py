"""Reading of run.yaml: settings, versions and arguments of a run."""

from pathlib import Path
from typing import Any

import yaml

from flowgrain.settings import SettingsError, one_line
from flowgrain.yaml_text import check_yaml, syntax_error

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


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
    try:
        text = file.read_text(encoding="utf-8")
        check_yaml(text, mapping=True)
        values = yaml.load(text, Loader=_Loader) or {}
    except UnicodeDecodeError as error:
        raise SettingsError(
            f"{file}: not UTF-8 text ({error.reason} at byte {error.start}). Save it as UTF-8."
        ) from None
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        reason = syntax_error(error) or one_line(error)
        if not reason.startswith(("line ", "contains ")):
            reason = f"not readable as YAML: {reason}"
        raise SettingsError(f"{file}: {reason}.") from error
    if not all(isinstance(key, str) for key in values):
        raise SettingsError(
            f"{file}: keys must be text. Write `section:` and below it `key: value`."
        )
    found: dict[str, Any] = values
    return found
