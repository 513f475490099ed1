"""The rules of GenEval: which boxes count, the benchmark's verdict, and the training credit.

The requirements of a prompt are a line of GenEval's prompt file: `include`, a list of {class,
count, optional color, optional position: [relation, index of an earlier entry]}, and optionally
`exclude`, a list of {class, count}: the image must show fewer than `count` objects. Objects are
boxes by class name, in descending order of their scores.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flowgrain.rewards.colors import COLORS
from flowgrain.rewards.detection import Box
from flowgrain.settings import did_you_mean

MARGIN = 0.1
"""Centers are apart if they differ by more than this fraction of the sum of the box sizes."""

RELATIONS = ("left of", "right of", "above", "below")
"""The positions that a prompt can require."""

Requirements = Mapping[str, Any]
Objects = Mapping[str, Sequence[Box]]


@dataclass(frozen=True)
class Verdict:
    """The benchmark's verdict about an image.

    Attributes:
        correct: all requirements are met.
        reasons: the requirements that are not met, with the words of the benchmark.
    """

    correct: bool
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Credit:
    """The graded training credit of an image.

    Attributes:
        parts: credit of each demand, 1 if it is met. The credit of a count can be negative.
        correct: all demands are met, with equal counts.
    """

    parts: tuple[float, ...]
    correct: bool

    @property
    def value(self) -> float:
        """The mean credit. 0 without demands."""
        return sum(self.parts) / max(len(self.parts), 1)


def kept_boxes(boxes: Sequence[Box], threshold: float, max_boxes: int) -> dict[str, list[Box]]:
    """The boxes that count by class, in descending order of their scores.

    Boxes that overlap are all kept, as in the benchmark.

    Args:
        boxes: boxes in any order.
        threshold: a box counts if its score is higher.
        max_boxes: number of boxes of a class. The boxes with the highest scores are kept.
    """
    kept: dict[str, list[Box]] = {}
    for box in sorted(boxes, key=lambda box: -box.score):
        if box.score > threshold and len(kept.setdefault(box.name, [])) < max_boxes:
            kept[box.name].append(box)
    return kept


def relations(a: Box, b: Box) -> set[str]:
    """The positions of `a` relative to `b`: left of, right of, above, below; empty if not apart."""
    offset = np.array([(a.x0 + a.x1 - b.x0 - b.x1) / 2, (a.y0 + a.y1 - b.y0 - b.y1) / 2])
    size = np.array([a.x1 - a.x0 + b.x1 - b.x0, a.y1 - a.y0 + b.y1 - b.y0])
    apart = np.maximum(np.abs(offset) - MARGIN * size, 0) * np.sign(offset)
    if np.all(np.abs(apart) < 1e-3):
        return set()
    x, y = apart / np.linalg.norm(offset)
    holds = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name in holds if holds[name]}


def strict_verdict(requirements: Requirements, objects: Objects) -> Verdict:
    """The verdict of the benchmark.

    An entry of `include` needs at least `count` objects. Only the `count` objects with the highest
    scores must have the color and the position.
    """
    reasons: list[str] = []
    groups: list[Sequence[Box] | None] = []
    for entry in requirements.get("include", ()):
        found = objects.get(entry["class"], ())[: entry["count"]]
        reason = _failure(entry, found, groups)
        groups.append(None if reason else found)
        reasons += [reason] if reason else []
    for entry in requirements.get("exclude") or ():
        count = len(objects.get(entry["class"], ()))
        if count >= entry["count"]:
            reasons.append(f"expected {entry['class']}<{entry['count']}, found {count}")
    return Verdict(not reasons, tuple(reasons))


def _failure(
    entry: Mapping[str, Any], found: Sequence[Box], groups: Sequence[Sequence[Box] | None]
) -> str | None:
    """Why the best objects of an entry do not meet it. None: they meet it."""
    name, count, color = entry["class"], entry["count"], entry.get("color")
    if len(found) < count:
        return f"expected {name}>={count}, found {len(found)}"
    named = [box.color for box in found]
    if color is not None and named.count(color) < count:
        others = ", ".join(f"{named.count(c)} {c}" for c in COLORS if c in named)
        return f"expected {color} {name}>={count}, found {named.count(color)} {color}; and {others}"
    if entry.get("position") is None:
        return None
    relation, index = entry["position"]
    targets = groups[index]
    if targets is None:
        return f"no target for {name} to be {relation}"
    for held in (relations(box, target) for box in found for target in targets):
        if relation not in held:
            return f"expected {name} {relation} target, found {' and '.join(sorted(held))} target"
    return None


def graded_credit(requirements: Requirements, objects: Objects) -> Credit:
    """The training credit of Flow-GRPO's reward server: a part for each demand of `include`.

    Counts and colors: 1 - |found - wanted| / wanted. Positions: 1 or 0. A color or a position earns
    nothing if the count is not equal. `exclude` has no part, because counts must be equal.

    For a position that does not hold, the server adds two parts, 0 and 1. This is a mistake of the
    server. Here, the position has one part, 0. An entry with a color and a position has a part for
    each, while the server leaves some of them out after a failure. GenEval has no such entry.
    """
    parts: list[float] = []
    groups: list[Sequence[Box] | None] = []
    for entry in requirements.get("include", ()):
        wanted, color, position = entry["count"], entry.get("color"), entry.get("position")
        found = objects.get(entry["class"], ())
        matched = equal = len(found) == wanted
        parts.append(1 - abs(len(found) - wanted) / wanted)
        if color is not None:
            named = sum(box.color == color for box in found)
            parts.append(1 - abs(named - wanted) / wanted if equal else 0.0)
            matched = matched and named == wanted
        if position is not None:
            relation, index = position
            targets = groups[index]
            matched = (
                matched
                and targets is not None
                and all(relation in relations(box, target) for box in found for target in targets)
            )
            parts.append(float(matched))
        groups.append(found if matched else None)
    return Credit(tuple(parts), None not in groups)


def colored_boxes(requirements: Requirements, objects: Objects) -> dict[str, int]:
    """Number of boxes of each class whose color matters, counted from the highest score.

    The color only matters if there are enough objects, and then for the best `count` objects.
    """
    numbers: dict[str, int] = {}
    for entry in requirements.get("include", ()):
        name, count = entry["class"], entry["count"]
        if entry.get("color") is not None and len(objects.get(name, ())) >= count:
            numbers[name] = max(numbers.get(name, 0), count)
    return numbers


def check_requirements(requirements: Requirements, classes: Collection[str]) -> None:
    """Check that a detector can decide about the requirements of a prompt.

    Args:
        requirements: a line of GenEval's prompt file.
        classes: names of the classes of the detector.

    Raises:
        ValueError: a class, a count, a color or a position is unknown or invalid.
    """
    include = requirements.get("include")
    if not isinstance(include, Sequence) or isinstance(include, str):
        raise ValueError(f"include={include!r}: give a list of objects")
    for index, entry in enumerate(include):
        _check_object(entry, classes)
        color, position = entry.get("color"), entry.get("position")
        if color is not None and color not in COLORS:
            raise ValueError(f"color={color!r}: unknown color. Use one of {', '.join(COLORS)}")
        if position is not None and not _is_position(position, index):
            raise ValueError(
                f"position={position!r}: give [relation, index of an earlier object]. "
                f"Relations: {', '.join(RELATIONS)}"
            )
    for entry in requirements.get("exclude") or ():
        _check_object(entry, classes)


def _is_position(position: Any, entries: int) -> bool:
    if not isinstance(position, Sequence) or len(position) != 2:
        return False
    relation, index = position
    return relation in RELATIONS and isinstance(index, int) and 0 <= index < entries


def _check_object(entry: Any, classes: Collection[str]) -> None:
    if not isinstance(entry, Mapping) or "class" not in entry or "count" not in entry:
        raise ValueError(f"{entry!r}: an object needs a class and a count")
    name, count = entry["class"], entry["count"]
    if name not in classes:
        hint = did_you_mean(str(name), classes)
        raise ValueError(f"class={name!r}: the detector has no such class. {hint}".strip())
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"count={count!r} of class {name!r}: give a positive whole number")


def read_requirements(path: Path, classes: Collection[str]) -> dict[str, dict[str, Any]]:
    """The lines of GenEval's prompt file (JSON lines) by prompt.

    Args:
        path: the file.
        classes: names of the classes of the detector.

    Raises:
        ValueError: a line does not have this format. The message names the line.
    """
    requirements = {}
    for number, text in enumerate(path.read_text(encoding="utf-8").rstrip("\n").split("\n"), 1):
        try:
            line = json.loads(text)
            requirements[line["prompt"]] = line
            check_requirements(line, classes)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}: line {number} is not a line of a GenEval file ({error})"
            ) from None
    return requirements
