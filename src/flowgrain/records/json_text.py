"""JSON in the files of a run. Numbers that are not finite are null."""

import json
import math
from collections.abc import Mapping
from typing import Any


def to_json(values: Any) -> str:
    """`values` as one line of JSON. Numbers that are not finite become null."""
    try:
        return json.dumps(values, allow_nan=False)
    except ValueError:  # rare, and much slower
        return json.dumps(_finite(values), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return value


def parse_json(content: bytes) -> Any:
    """The JSON value in `content`.

    Raises:
        ValueError: it is not JSON in UTF-8.
    """
    try:
        return json.loads(content.decode())
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number that a float can hold.

    NaN counts as a number. true does not, nor an integer that is too large for a float.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        float(value)
    except OverflowError:
        return False
    return True


def numbers(values: Any, what: str) -> list[float]:
    """A JSON list of numbers and null, which becomes NaN.

    Raises:
        ValueError: it is something else. The message starts with `what`.
    """
    if not isinstance(values, list):
        raise ValueError(f"{what} is not a list of numbers")
    if not all(value is None or is_number(value) for value in values):
        raise ValueError(f"{what} has a value that is not a number")
    return [math.nan if value is None else float(value) for value in values]


def columns(values: Any, what: str, length: int) -> dict[str, list[float]]:
    """A JSON object of lists with `length` numbers each.

    Raises:
        ValueError: it is something else, or a list has another length.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{what} is not a JSON object")
    found = {name: numbers(column, f"{what}/{name}") for name, column in values.items()}
    for name, column in found.items():
        if len(column) != length:
            raise ValueError(f"{what}/{name} has {len(column)} values in place of {length}")
    return found
