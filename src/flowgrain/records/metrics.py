"""Reading of metrics.jsonl: one JSON object of numbers per training step."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowgrain.records.json_text import is_number, parse_json

log = logging.getLogger(__name__)

_MOST_NUMBERS = 5
"""Line numbers that a message lists."""


@dataclass(frozen=True)
class DamagedLine:
    """A line of metrics.jsonl that is not a record of a step.

    Attributes:
        number: number of the line, from 1.
        text: its bytes.
        reason: what is wrong.
        unfinished: it is the last line and has no end. It may still be being written.
    """

    number: int
    text: bytes
    reason: str
    unfinished: bool


def parse_metrics(content: bytes) -> tuple[list[dict[str, Any]], list[DamagedLine]]:
    """The records in the content of a metrics.jsonl, and its damaged lines."""
    records, damaged = [], []
    lines = content.split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            records.append(_check_record(parse_json(line)))
        except ValueError as error:
            damaged.append(DamagedLine(number, line, str(error), number == len(lines)))
    return records, damaged


def describe_lines(lines: Sequence[DamagedLine]) -> str:
    """The numbers of damaged lines, and the reason of the first."""
    numbers = ", ".join(str(line.number) for line in lines[:_MOST_NUMBERS])
    if len(lines) == 1:
        return f"line {numbers} is damaged ({lines[0].reason})"
    more = f" and {len(lines) - _MOST_NUMBERS} more" if len(lines) > _MOST_NUMBERS else ""
    return f"lines {numbers}{more} are damaged (line {lines[0].number}: {lines[0].reason})"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All lines of a run's metrics.jsonl. Empty if there is no such file.

    Damaged lines are left out with a warning, and a last line that is still being written without.
    """
    file = folder / "metrics.jsonl"
    records, damaged = parse_metrics(file.read_bytes() if file.exists() else b"")
    damaged = [line for line in damaged if not line.unfinished]
    if damaged:
        log.warning("%s: %s and left out", file, describe_lines(damaged))
    return [
        {key: math.nan if value is None else value for key, value in record.items()}
        for record in records
    ]


def _check_record(values: Any) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")
    if not isinstance(values.get("step"), int) or isinstance(values["step"], bool):
        raise ValueError("no step")
    wrong = [key for key, value in values.items() if value is not None and not is_number(value)]
    if wrong:
        raise ValueError(f"{wrong[0]} is not a number")
    return values
