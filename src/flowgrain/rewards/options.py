"""Options of a reward: keyword arguments that are checked against the signature of the reward."""

import inspect
import json
import re
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError

from flowgrain.settings import SettingsError, nearest


class OptionError(SettingsError):
    """An option of a reward that cannot be used. The message starts with `OPTION=VALUE:`.

    A reward raises it in its constructor. `build_reward` puts the name of the reward before it.
    """


def check_device(device: str) -> str:
    """`device`, if this machine has it.

    Args:
        device: "cpu", "cuda" or "cuda:INDEX".

    Raises:
        OptionError: the machine does not have this device.
    """
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", device)
    if match is None:
        raise OptionError(f"device={device}: unknown device. Use cpu, cuda or cuda:INDEX.")
    if device == "cpu":
        return device
    if not torch.cuda.is_available():
        raise OptionError(f"device={device}: no GPU is available. Use cpu.")
    count = torch.cuda.device_count()
    if int(match[1] or 0) >= count:
        raise OptionError(f"device={device}: the last GPU is cuda:{count - 1}. Use a lower index.")
    return device


def option_parameters(target: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Options by name: the arguments of a class, or the keyword-only arguments of a function."""
    kinds: tuple[Any, ...] = (inspect.Parameter.KEYWORD_ONLY,)
    if isinstance(target, type):
        kinds += (inspect.Parameter.POSITIONAL_OR_KEYWORD,)
    return {p.name: p for p in inspect.signature(target).parameters.values() if p.kind in kinds}


def checked_options(
    place: str, target: Callable[..., Any], options: Mapping[str, Any], reserved: Collection[str]
) -> dict[str, Any]:
    """`options`, converted to the types of the arguments of `target`.

    Args:
        place: path of the setting, for error messages.
        target: the class or function, such as a reward.
        options: YAML values by name.
        reserved: names of the settings that every reward has. An option cannot have these names.

    Raises:
        SettingsError: an option is unknown, missing, or has the wrong type.
    """
    known = option_parameters(target)
    parameters = inspect.signature(target).parameters.values()
    any_name = any(p.kind is p.VAR_KEYWORD for p in parameters)
    valid = f"Options: {', '.join(known)}." if known else "This reward has no options."
    for option in known:
        if option in reserved:
            raise SettingsError(
                f"{place}.{option}: every reward has a setting with this name. "
                "Rename the argument of the custom reward."
            )
    for option, value in options.items():
        if option not in known and not any_name:
            close = nearest(option, [*known, *reserved])
            hint = f"Did you mean {close!r}? " if close else ""
            raise SettingsError(f"{place}.{option}={value!r}: unknown option. {hint}{valid}")
    for option, parameter in known.items():
        if parameter.default is inspect.Parameter.empty and option not in options:
            raise SettingsError(f"{place}.{option}: this option is required. {valid}")
    hints = _hints(place, target) if options else {}
    checked = {}
    for option, value in options.items():
        try:
            checked[option] = _converted(value, hints.get(option, Any))
        except ValueError as error:
            raise SettingsError(f"{place}.{option}={value!r}: {error}. {valid}") from error
    return checked


def _hints(place: str, target: Callable[..., Any]) -> dict[str, Any]:
    """The type of each argument of `target`."""
    function: Any = target
    if isinstance(target, type):
        function = target.__init__  # type: ignore[misc]
    elif not inspect.isroutine(target):
        function = type(target).__call__
    try:
        return typing.get_type_hints(function, include_extras=True)
    except NameError as error:
        raise SettingsError(
            f"{place}: the types of its options are unknown: {error}. "
            "Import these types outside of TYPE_CHECKING blocks."
        ) from error


def _converted(value: Any, hint: Any) -> Any:
    """The YAML value `value` as a value of type `hint`, without conversions between basic types.

    Raises:
        ValueError: the value is not of this type.
    """
    try:
        return TypeAdapter(hint).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        raise ValueError(error.errors()[0]["msg"]) from None
    except PydanticSchemaGenerationError:
        raise ValueError(f"an option of type {hint} can only be set in Python") from None
    except TypeError as error:
        raise ValueError(f"not a YAML value ({error})") from None
