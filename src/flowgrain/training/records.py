"""Reading of a run's records, and what to do with damaged records: they never stop a run."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowgrain.training.files import flush

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
            records.append(_check_record(_parse(line)))
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


def _parse(content: bytes) -> Any:
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


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_record(values: Any) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")
    if not isinstance(values.get("step"), int) or isinstance(values["step"], bool):
        raise ValueError("no step")
    wrong = [key for key, value in values.items() if value is not None and not _is_number(value)]
    if wrong:
        raise ValueError(f"{wrong[0]} is not a number")
    return values


def _check_evaluation(values: Any) -> None:
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")
    scores = values["scores"].values()
    if not all(_is_number(values[key]) for key in ("step", "num_steps")):
        raise ValueError("step and num_steps must be numbers")
    prompts = values["prompts"]
    if not isinstance(prompts, list) or not all(isinstance(text, str) for text in prompts):
        raise ValueError("prompts must be texts")
    if not all(len(column) == len(prompts) for column in scores):
        raise ValueError("a reward has another number of scores than prompts")
    if not all(_is_number(value) for column in scores for value in column):
        raise ValueError("a score is not a number")
    if not all(_is_number(value) for value in values["parts"].values()):
        raise ValueError("a part is not a number")


def _check_tree(values: Any) -> None:
    if not isinstance(values, Mapping):
        raise ValueError("not a JSON object")


_OF_STEP = re.compile(r"-\d{6,}\.json$")
"""End of a file name of the run."""
_CHECKS: Mapping[str, Callable[[Any], None]] = {
    "evaluations/step-*.json": _check_evaluation,
    "images/tree-*.json": _check_tree,
}


def set_damaged_lines_aside(file: Path) -> list[str]:
    """Append the damaged lines of metrics.jsonl to metrics.damaged.jsonl.

    `file` does not change. The caller replaces it.

    Returns:
        A message if there were damaged lines.
    """
    if not file.exists():
        return []
    _, damaged = parse_metrics(file.read_bytes())
    if not damaged:
        return []
    aside = file.with_name(f"{file.stem}.damaged{file.suffix}")
    with aside.open("ab") as stream:
        stream.write(b"".join(line.text + b"\n" for line in damaged))
    flush(aside)
    return [f"{file}: {describe_lines(damaged)}. Moved to {aside.name}"]


def set_damaged_files_aside(folder: Path) -> list[str]:
    """Rename the damaged evaluations and trees of a run to damaged-NAME.

    Returns:
        A message for each file.
    """
    messages = []
    for pattern, check in _CHECKS.items():
        for path in sorted(p for p in folder.glob(pattern) if _OF_STEP.search(p.name)):
            try:
                check(_parse(path.read_bytes()))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                aside = path.with_name(f"damaged-{path.name}")
                path.rename(aside)
                reason = f"{error} is missing" if isinstance(error, KeyError) else error
                messages.append(f"{path}: damaged ({reason}), and renamed to {aside.name}")
    return messages
