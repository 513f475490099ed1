"""Base class of the configuration sections, documented settings, and the settings error."""

import difflib
from collections.abc import Iterable
from copy import copy
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, Strict

_LISTED = 20
"""Number of known names that a message lists."""


class SettingsError(ValueError):
    """A setting cannot be used. The message names the setting, its value and the fix."""


class SettingsWarning(UserWarning):
    """A setting is valid, but has no effect or an effect that surprises."""


class Section(BaseModel):
    """Base class of a group of settings: immutable, strictly typed, without unknown keys."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        validate_default=True,
        allow_inf_nan=False,
    )

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Let a subclass change a default with `field: type = value`.

        The field keeps its description and its unit. It keeps its constraints, too, unless the
        subclass gives it another type.
        """
        super().__pydantic_init_subclass__(**kwargs)
        changed = False
        for name, field in cls.model_fields.items():
            inherited = next(
                (
                    base.model_fields[name]
                    for base in cls.__mro__[1:]
                    if issubclass(base, Section) and name in base.model_fields
                ),
                None,
            )
            if inherited is None or field.description is not None:
                continue
            own = copy(field)
            own.description = inherited.description
            own.json_schema_extra = inherited.json_schema_extra
            if field.annotation == inherited.annotation:
                own.metadata = [*inherited.metadata, *field.metadata]
            cls.__pydantic_fields__[name] = own
            changed = True
        if changed:
            cls.model_rebuild(force=True)


def Setting(  # noqa: N802  (reads like pydantic's Field)
    default: Any, description: str, *, unit: str = "", keep: bool = False, **constraints: Any
) -> Any:
    """Field of a section with a description.

    Args:
        default: default value, or ``...`` for a required field.
        description: one sentence for the reference page and for error messages.
        unit: unit of the value, such as "pixels" or "steps". Empty for names, switches and pure
            numbers.
        keep: whether a resumed run must keep the value of the original run.
        **constraints: pydantic constraints such as ``ge=1``.
    """
    extra: dict[str, Any] = {"unit": unit, "keep": keep}
    return Field(default, description=description, json_schema_extra=extra, **constraints)


IntTuple = Annotated[tuple[int, ...], Strict(False)]
"""Integers, written as a YAML list: [1, 2]."""
StrTuple = Annotated[tuple[str, ...], Strict(False)]
"""Strings, written as a YAML list."""


def printable(value: object) -> str:
    """`value` as text in one line. Line breaks and control characters are escaped."""
    text = str(value)
    return text if text.isprintable() else repr(text)


def one_line(text: object, limit: int = 500) -> str:
    """`text` in one line of at most `limit` characters, without control characters."""
    line = "".join(c if c.isprintable() else " " for c in " ".join(str(text).split()))
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The entry of `known` with the spelling closest to `name`. None if no entry is close."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return found[0] if found else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Hint for an error message: the nearest known name, or the first known names."""
    known = list(known)
    close = nearest(name, known, 0.5)
    if close:
        return f"Did you mean {close!r}?"
    more = f" and {len(known) - _LISTED} more" if len(known) > _LISTED else ""
    return f"Known: {', '.join(known[:_LISTED])}{more}."
