"""JSON of the answers. YAML files of users may contain values that JSON does not have."""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

_MAX_DEPTH = 100
"""Levels of nested values. Deeper ones become null."""
_LARGEST = 2**63
"""Integers from here on become null: their text may be too long for Python."""

_HUGE = re.compile(r"\d{19}")
"""Digits of a huge integer. A float has at most 17."""


def to_json(values: Any) -> str:
    """`values` as JSON.

    Numbers that are not finite, huge integers and deeply nested values become null, unknown values
    become text.
    """
    try:
        text = json.dumps(values, allow_nan=False, separators=(",", ":"))
        if not _HUGE.search(text):
            return text
    except (ValueError, TypeError, RecursionError):
        pass
    return json.dumps(_plain(values, 0), allow_nan=False, separators=(",", ":"))


def _plain(value: Any, depth: int) -> Any:
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, int):
        return value if -_LARGEST <= value < _LARGEST else None
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if depth == _MAX_DEPTH:
        return None
    if isinstance(value, Mapping):
        return {_key(key): _plain(part, depth + 1) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part, depth + 1) for part in value]
    return _text(value)


def _key(value: Any) -> str:
    return value if isinstance(value, str) else _text(_plain(value, _MAX_DEPTH))


def _text(value: Any) -> str:
    """The value as text. A set or a date may contain what has no text."""
    try:
        return str(value)
    except (ValueError, RecursionError):
        return type(value).__name__
