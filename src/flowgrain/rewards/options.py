"""Options of a reward: keyword arguments that are checked against the signature of the reward."""

import functools
import inspect
import json
import re
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

import torch
from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError

from flowgrain.settings import SettingsError, nearest

C = TypeVar("C", bound=Callable[..., Any])


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
    return {p.name: p for p in _parameters(target) if p.kind in kinds}


def _parameters(target: Callable[..., Any]) -> list[inspect.Parameter]:
    """The arguments of `target`. Empty if they are unknown: a function that is not in Python."""
    try:
        return list(inspect.signature(target).parameters.values())
    except (TypeError, ValueError):
        return []


def check_call(name: str, reward: C) -> C:
    """`reward`, if it can be called with images and prompts. Unknown signatures are accepted.

    Raises:
        SettingsError: the reward needs other arguments.
    """
    try:
        signature = inspect.signature(reward)
    except (TypeError, ValueError):
        return reward
    try:
        signature.bind(None, None)
    except TypeError:
        raise SettingsError(f"rewards[{name}]: {_wrong_call(reward, signature)}") from None
    return reward


def _wrong_call(reward: Callable[..., Any], signature: inspect.Signature) -> str:
    """What is wrong with the arguments of a reward, and the fix."""
    function = reward.func if isinstance(reward, functools.partial) else reward
    is_function, kinds = (
        inspect.isroutine(function),
        (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD),
    )
    own = function.__name__ if is_function else f"{type(function).__name__}.__call__"
    parameters = list(signature.parameters.values())
    required = [p.name for p in parameters if p.default is p.empty and p.kind not in kinds]
    call = f"{own}({', '.join(signature.parameters)})"
    plain = f"def {own}(images, prompts" if is_function else "def __call__(self, images, prompts"
    if not required[2:]:
        return (
            f"{call} does not take two arguments. A reward is called with images and prompts. "
            f"Write {plain})."
        )
    where = "an option" if is_function else "an argument of __init__"
    option = f", *, {required[2]}" if is_function else ""
    return (
        f"{call} needs the argument {required[2]!r}. A reward is called with images and prompts "
        f"only. Make it {where}: {plain}{option})."
    )


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
    any_name = any(p.kind is p.VAR_KEYWORD for p in _parameters(target))
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
            shared = f" Other settings: {', '.join(reserved)}." if close in reserved else ""
            raise SettingsError(
                f"{place}.{option}={value!r}: unknown option. {hint}{valid}{shared}"
            )
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
