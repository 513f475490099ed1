"""JSON of the answers. YAML files of users may contain values that JSON does not have."""

import json
import math
from collections.abc import Mapping
from typing import Any


def to_json(values: Any) -> str:
    """`values` as JSON. Numbers that are not finite become null, unknown values become text."""
    try:
        return json.dumps(values, allow_nan=False, separators=(",", ":"))
    except (ValueError, TypeError):
        return json.dumps(_plain(values), allow_nan=False, separators=(",", ":"))


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value if value is None or isinstance(value, str | int) else str(value)
