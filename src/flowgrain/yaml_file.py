"""Reading of a YAML file that contains a mapping, with one readable message for every error."""

from collections.abc import Callable
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml

from flowgrain.settings import SettingsError, one_line
from flowgrain.yaml_text import check_yaml, syntax_error

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def plain(text: str) -> Any:
    """The plain values of YAML text."""
    return yaml.load(text, Loader=_Loader) or {}


def read_mapping(
    file: Path | Traversable,
    parse: Callable[[str], Any] = plain,
    errors: tuple[type[Exception], ...] = (),
) -> dict[str, Any]:
    """The mapping in a YAML file.

    Args:
        file: the file.
        parse: the values of its text, which was checked by `check_yaml`.
        errors: further errors that `parse` raises for a wrong file.

    Raises:
        SettingsError: the file is not YAML, or does not contain a mapping with text keys.
    """
    wrong: tuple[type[Exception], ...] = (yaml.YAMLError, OSError, ValueError, RecursionError)
    try:
        text = file.read_text(encoding="utf-8")
        check_yaml(text, mapping=True)
        values: dict[str, Any] = parse(text)
    except UnicodeDecodeError as error:
        raise SettingsError(
            f"{file}: not UTF-8 text ({error.reason} at byte {error.start}). Save it as UTF-8."
        ) from None
    except wrong + errors as error:
        reason = syntax_error(error) or one_line(error)
        if not reason.startswith(("line ", "contains ")):
            reason = f"not readable as YAML: {reason}"
        raise SettingsError(f"{file}: {reason}.") from error
    if not all(isinstance(key, str) for key in values):
        raise SettingsError(
            f"{file}: keys must be text. Write `section:` and below it `key: value`."
        )
    return values
