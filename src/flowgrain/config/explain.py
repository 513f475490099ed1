"""Error messages of wrong settings: the full path, the value, and a fix or the nearest setting."""

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from flowgrain.config.schema import Config
from flowgrain.methods import METHODS, Method
from flowgrain.models.base import BACKBONES
from flowgrain.registry import canonical
from flowgrain.rewards.base import REWARDS, SHAPES_REWARDS, RewardConfig
from flowgrain.settings import Section, SettingsError, did_you_mean, nearest

_RENAMED = {"runtime.loggers": "runtime.trackers"}
"""Settings with another name in earlier versions."""


def explain(error: ValidationError, values: Mapping[str, Any]) -> Iterator[str]:
    """Error messages, one for each wrong setting of `values`."""
    messages: dict[str, str] = {}
    details = error.errors()
    words = {_path(d): d["ctx"]["expected"] for d in details if d["type"] == "literal_error"}
    for detail in details:
        message = _shortened(_explain(detail, values, words.get(_path(detail), "")))
        # pydantic reports every alternative of a union. The first message of a path is enough.
        messages.setdefault(message.partition("=")[0].partition(": ")[0], message)
    nested = [
        path for path in messages if any(o.startswith((f"{path}.", f"{path}[")) for o in messages)
    ]
    yield from (message for path, message in messages.items() if path not in nested)


def _shortened(message: str) -> str:
    """`message` without its middle, if a value makes it too long to read."""
    if len(message) <= _MAX_MESSAGE:
        return message
    return f"{message[: _MAX_MESSAGE // 2]} ... {message[-_MAX_MESSAGE // 2 :]}"


def _shown(value: Any) -> str:
    """`value` as it is written in YAML."""
    if isinstance(value, str) and _PLAIN_TEXT.fullmatch(value) and value.isprintable():
        return value
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_shown(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_shown, value))}]"
    try:
        return repr(value)
    except ValueError:  # Python writes no integers with more than 4,300 digits
        return "a very large number"


def setting_paths(method: type[Method] | None = None) -> Iterator[str]:
    """Full paths of all settings, including the options of `method`."""
    yield from _paths(Config, "")
    if method is not None:
        yield "method.name"
        yield from _paths(method, "method.")


def _paths(section: type[Section], prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        kind = field.annotation
        if _is_section(kind):
            if kind is not Method:
                yield from _paths(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _loc(detail: ErrorDetails) -> tuple[int | str, ...]:
    """The keys of a setting, without the alternatives of a union."""
    loc = tuple(part for part in detail["loc"] if isinstance(part, int) or part.isidentifier())
    while loc and loc[-1] in _UNION_TAGS:
        loc = loc[:-1]
    return loc


def _path(detail: ErrorDetails) -> str:
    return ".".join(map(str, _loc(detail)))


def _explain(detail: ErrorDetails, values: Mapping[str, Any], words: str) -> str:
    """The message of a wrong setting. `words`: texts that it accepts, besides other types."""
    method, value = _method(values), detail["input"]
    if detail["loc"][:1] == ("method",) and method is None:
        return f"method.name: {_method_name(values)}"
    if detail["type"] == "extra_forbidden":
        return _unknown(".".join([*map(str, detail["loc"]), *_first_keys(value)]), method)
    loc, path = _loc(detail), _path(detail)
    if detail["type"] == "missing" and isinstance(loc[-1], int):  # of a list of fixed length
        path = ".".join(map(str, loc[:-1]))
        return f"{path}={_shown(value)}: has too few values. {_description(path, method)}"
    if isinstance(value, Mapping) and value and detail["type"] in _PLAIN:
        return _no_parts(path, value)
    message = _message(detail, path, _field(path, method))
    if words and detail["type"] != "literal_error" and words.strip("'") not in message:
        message = f"{message}, or {words}"
    if not path:
        return f"{message}."
    if detail["type"] == "missing":
        model = str(_at(values, "model", "name"))
        if path == "rewards" and model not in BACKBONES:
            return (
                f"model.name={model}: there is no such backbone. {did_you_mean(model, BACKBONES)}"
            )
        return f"{path}: {_missing(path, method, values)}".rstrip()
    description = "" if ". " in message else _description(path, method)
    return f"{_named(loc, values)}={_shown(value)}: {message}. {description}".rstrip()


def _no_parts(path: str, value: Any) -> str:
    """The message of a mapping in place of a value."""
    keys = list(_first_keys(value))
    for key in keys:
        value = next((entry for name, entry in value.items() if str(name) == key), None)
    text = _shown(value)
    return f"{'.'.join([path, *keys])}={text}: {path} has no parts. Write {path}={text}."


def _named(loc: tuple[int | str, ...], values: Mapping[str, Any]) -> str:
    """The path of a setting. Entries of a list of rewards have their name: rewards[oracle]."""
    path, found = "", values  # type: str, Any
    for part in loc:
        found = found[part] if _contains(found, part) else None
        name = found.get("name") if isinstance(found, Mapping) and isinstance(part, int) else None
        path += f"[{name}]" if isinstance(name, str) else f".{part}"
    return path.removeprefix(".")


def _contains(values: Any, key: int | str) -> bool:
    if isinstance(key, int):
        return isinstance(values, list | tuple) and key < len(values)
    return isinstance(values, Mapping) and key in values


_MAX_MESSAGE = 1200
"""Number of characters of an error message."""
_TYPES = {
    "int_type": "must be a whole number, such as 40",
    "int_parsing": "must be a whole number, such as 40",
    "int_from_float": "must be a whole number, such as 40",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be a text",
    "string_too_short": "is empty",
}
"""Messages of types of errors."""
_PLAIN_TEXT = re.compile(
    r"(?!(?:true|false|null|yes|no|on|off)$)[a-z_/~][^\[\]{}#'\"]*", re.IGNORECASE
)
"""Texts that YAML does not read as another type without quotes."""
_PLAIN = ("int_type", "float_type", "bool_type", "string_type", "literal_error")
"""Types of errors of settings that have no parts."""
_UNION_TAGS = ("int", "float", "str", "tuple", "list", "none")
"""Names that pydantic appends to a path for an alternative of a union."""


def _message(detail: ErrorDetails, path: str, field: Any) -> str:
    """The reason and the fix, without the final full stop."""
    if detail["type"] == "tuple_type":
        return f"must be a list. Write {path}=[{_entries(detail['input'], field)}]"
    if detail["type"] in _TYPES:
        return _TYPES[detail["type"]]
    if detail["type"] == "too_short":
        example = "clip" if path.endswith("rewards") else "VALUE"
        return f"must not be empty. Write for example {path}=[{example}]"
    if detail["type"] == "model_type":
        if path.split(".")[-1].isdecimal():  # an entry of a list of rewards
            return "is not a reward. Write a name, or {name: NAME, weight: 0.5}"
        return f"is a section. Write {path}.KEY=VALUE"
    message = detail["msg"].removeprefix("Value error, ").rstrip(".")
    message = message.replace("Input should be", "must be")
    return message[0].lower() + message[1:] if path else message


def _entries(value: Any, field: Any) -> str:
    """The entries of an example of the list in `field`: `value` if it can be an entry."""
    kinds = _entry_types(getattr(field, "annotation", None))
    if RewardConfig in kinds and value not in REWARDS:
        return SHAPES_REWARDS[0]
    if int in kinds and not isinstance(value, int):
        return "1"
    return str(value) if Ellipsis in kinds else ",".join([str(value)] * max(len(kinds), 1))


def _entry_types(kind: Any) -> tuple[Any, ...]:
    """The arguments of a tuple type, which may be a part of a union. Empty if there is none."""
    if get_origin(kind) is tuple:
        return get_args(kind)
    return next((found for part in get_args(kind) if (found := _entry_types(part))), ())


def _missing(path: str, method: type[Method] | None, values: Mapping[str, Any]) -> str:
    if path != "rewards":
        return f"required, but not set. {_description(path, method)}"
    name = _at(values, "model", "name")
    return f"required, because model.name={name} has no default rewards. Write rewards=[clip]."


def _at(values: Mapping[str, Any], section: str, key: str) -> Any:
    """The value of `key` in a section. None if there is none."""
    of_section = values.get(section)
    return of_section.get(key) if isinstance(of_section, Mapping) else None


def _first_keys(value: Any) -> Iterator[str]:
    """The path to the first setting below an unknown section."""
    while isinstance(value, Mapping) and value:
        key, value = next(iter(value.items()))
        yield str(key)


def _method(values: Mapping[str, Any]) -> type[Method] | None:
    section = values.get("method")
    name = section.get("name") if isinstance(section, Mapping) else None
    return METHODS.get(name) if isinstance(name, str) and name in METHODS else None


def _method_name(values: Mapping[str, Any]) -> str:
    section = values.get("method")
    if isinstance(section, str):
        return f"write method.name={section} instead of method={section}."
    name = section.get("name") if isinstance(section, Mapping) else None
    if name is None:
        return f"required, but not set. Known methods: {', '.join(METHODS)}."
    return f"there is no method {name!r}. {did_you_mean(str(name), METHODS)}"


def _methods_with(option: str) -> Iterator[str]:
    """Names of the methods that have an option. Methods that cannot be imported are left out."""
    for name in METHODS:
        with contextlib.suppress(SettingsError):
            if option in METHODS.get(name).model_fields:
                yield name


def _unknown(path: str, method: type[Method] | None) -> str:
    if path in _RENAMED:
        return f"{path} is not a setting. It is {_RENAMED[path]} now."
    option = path.removeprefix("method.").split(".")[0]
    if path.startswith("method.") and method is not None and option not in method.model_fields:
        users = list(_methods_with(option))
        if users:
            others = " or ".join(repr(name) for name in users[:3])
            return (
                f"Method {method.name!r} has no option {option!r}. "
                f"Remove it, or use method {others}."
            )
        close = nearest(option, method.model_fields)
        if close is not None:
            return (
                f"Method {method.name!r} has no option {option!r}. Did you mean 'method.{close}'?"
            )
    known = list(setting_paths(method))
    last = canonical(path.split(".")[-1])
    same = [name for name in known if canonical(name.split(".")[-1]) == last]
    section = path.split(".")[0]
    keys = [name.partition(".")[2] for name in known if name.startswith(f"{section}.")]
    if not same and keys and "." in path:
        close = nearest(path.partition(".")[2], keys)
        if close is None:
            return f"{path} is not a setting. The settings of {section}: {', '.join(keys)}."
        return f"{path} is not a setting. Did you mean '{section}.{close}'?"
    close = same[0] if same else nearest(path, known)
    if close is None:
        ends = {name.split(".")[-1]: name for name in known}
        end = nearest(path.split(".")[-1], ends)
        close = ends[end] if end is not None else None
    hint = f"Did you mean {close!r}?" if close else f"Sections: {', '.join(Config.model_fields)}."
    return f"{path} is not a setting. {hint}"


def _description(path: str, method: type[Method] | None) -> str:
    """The description of the setting at `path`, or of the list that contains it."""
    return getattr(_field(path, method), "description", None) or ""


def _field(path: str, method: type[Method] | None) -> Any:
    """The field of the setting at `path`, or of the list that contains it. None if unknown."""
    section, found = Config, None  # type: Any, Any
    for part in path.split("."):
        section = method if section is Method and method is not None else section
        if part.isdecimal():  # an entry of a list
            section = next((kind for kind in get_args(section) if _is_section(kind)), None)
        elif part in getattr(section, "model_fields", {}):
            field = section.model_fields[part]
            section, found = field.annotation, field
    return found


def _is_section(kind: Any) -> TypeGuard[type[Section]]:
    return isinstance(kind, type) and issubclass(kind, Section)
