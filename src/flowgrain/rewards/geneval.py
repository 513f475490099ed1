"""GenEval (Ghosh et al. 2023): checks objects, counts, colors and positions in an image.

Letters: I images. The requirements of a prompt are a line of GenEval's prompt file: `include`, a
list of {class, count, optional color, optional position: [relation, index of another entry]}, and
optionally `exclude`, a list of {class, count}: the image must show fewer than `count` objects.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from flowgrain.data import Prompt
from flowgrain.rewards.base import Explanation
from flowgrain.rewards.detection import Box, Detector, TransformersDetector
from flowgrain.rewards.options import OptionError

MARGIN = 0.1
"""Centers are apart if they differ by more than this fraction of the sum of the box sizes."""


@dataclass(frozen=True)
class Verdict:
    """Result of a check.

    Attributes:
        correct: all requirements are met.
        fraction: fraction of the requirements that are met.
        errors: descriptions of the requirements that are not met.
    """

    correct: bool
    fraction: float
    errors: tuple[str, ...]


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


def check_boxes(requirements: Mapping[str, Any], boxes: Sequence[Box]) -> Verdict:
    """Check the objects of an image against the requirements of its prompt.

    Args:
        requirements: a line of GenEval's prompt file.
        boxes: detected objects in descending order of their scores.
    """
    include, exclude = requirements.get("include", ()), requirements.get("exclude") or ()
    errors: list[str] = []
    matched: list[list[Box] | None] = []
    for entry in include:
        error, used = _check_entry(entry, include, boxes, matched)
        matched.append(None if error else used)
        errors += [error] if error else []
    for entry in exclude:
        count = sum(box.name == entry["class"] for box in boxes)
        if count >= entry["count"]:
            errors.append(f"{entry['class']}: {count}, but fewer than {entry['count']} expected")
    total = len(include) + len(exclude)
    return Verdict(not errors, 1 - len(errors) / max(total, 1), tuple(errors))


def _check_entry(
    entry: Mapping[str, Any],
    include: Sequence[Mapping[str, Any]],
    boxes: Sequence[Box],
    matched: Sequence[list[Box] | None],
) -> tuple[str | None, list[Box]]:
    """The error of an entry of `include`, or None, and the boxes that the entry uses."""
    name, count = entry["class"], entry["count"]
    used = [box for box in boxes if box.name == name][:count]
    if len(used) < count:
        return f"{name}: {len(used)} of {count}", used
    if entry.get("color") is not None and any(box.color != entry["color"] for box in used):
        return f"{name}: not {entry['color']}", used
    if entry.get("position") is not None:
        relation, index = entry["position"]
        others = matched[index] if index < len(matched) else None
        if others is None or not all(
            relation in relations(box, other) for box in used for other in others
        ):
            return f"{name}: not {relation} {include[index]['class']}", used
    return None, used


def read_requirements(path: Path) -> dict[str, dict[str, Any]]:
    """The lines of GenEval's prompt file (JSON lines) by prompt.

    Raises:
        ValueError: a line does not have this format. The message names the line.
    """
    requirements = {}
    for number, text in enumerate(path.read_text(encoding="utf-8").rstrip("\n").split("\n"), 1):
        try:
            line = json.loads(text)
            requirements[line["prompt"]] = line
            for entry in line["include"]:
                if not isinstance(entry["class"], str) or int(entry["count"]) <= 0:
                    raise ValueError("an entry of `include` needs a class and a positive count")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: line {number} is not a line of a GenEval file ({error})"
            ) from None
    return requirements


class DetectionReward:
    """The GenEval score from the boxes of any detector.

    The requirements are fields of the prompts if GenEval's file is the prompt file. Otherwise they
    are read from `prompt_file`. A prompt without requirements has no score (NaN).

    Args:
        detector: the detector.
        prompt_file: GenEval's prompt file, for prompts that have only a text.
    """

    mean_of_parts = True

    def __init__(self, detector: Detector, prompt_file: str | None = None) -> None:
        self.detector = detector
        self.requirements: dict[str, dict[str, Any]] = {}
        if prompt_file is not None:
            path = Path(prompt_file).expanduser()
            if not path.is_file():
                raise OptionError(
                    f"prompt_file={prompt_file}: there is no such file. "
                    "Give the path of GenEval's prompt file."
                )
            try:
                self.requirements = read_requirements(path)
            except ValueError as error:
                raise OptionError(f"prompt_file={error}.") from error

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Fractions [I] of the requirements that are met, for images [I, 3, H, W] in 0..1."""
        return torch.as_tensor(self.explain(images, prompts).scores)

    def explain(self, images: Tensor, prompts: Sequence[Prompt]) -> Explanation:
        """The scores. By task (`tag`): 1 if an image meets all requirements, otherwise 0."""
        lines = [
            prompt.fields if "include" in prompt.fields else self.requirements.get(prompt.text)
            for prompt in prompts
        ]
        verdicts = [self._check(image, line) for image, line in zip(images, lines, strict=True)]
        tasks = [line.get("tag", "") if line is not None else "" for line in lines]
        parts = {task: torch.full((len(images),), torch.nan) for task in tasks if task}
        for i, (task, verdict) in enumerate(zip(tasks, verdicts, strict=True)):
            if task and verdict is not None:
                parts[task][i] = float(verdict.correct)
        scores = [torch.nan if verdict is None else verdict.fraction for verdict in verdicts]
        return Explanation(torch.tensor(scores), parts)

    def _check(self, image: Tensor, requirements: Mapping[str, Any] | None) -> Verdict | None:
        if requirements is None:
            return None
        include = requirements["include"]
        colored = [entry["class"] for entry in include if entry.get("color") is not None]
        return check_boxes(requirements, self.detector(image, colored))


class GenEval(DetectionReward):
    """GenEval (Ghosh et al. 2023, arXiv:2310.11513) with an object detection model of transformers.

    Range: 0..1, the fraction of the requirements that are met. By task, as in the benchmark, the
    fraction of images that meet all requirements. License of the rules: MIT. The license and the
    input size of the model depend on the detector.

    The requirements are fields of the prompts if GenEval's file is the prompt file. Otherwise they
    are read from `prompt_file`. A prompt without requirements has no score (NaN).

    Args:
        path: directory or Hugging Face repository of the detector, such as facebook/detr-resnet-50.
        prompt_file: GenEval's prompt file, for prompts that have only a text.
        device: "cpu", "cuda" or "cuda:INDEX".
        threshold: lowest score of a detected object, 0..1.
    """

    def __init__(
        self,
        path: str,
        prompt_file: str | None = None,
        device: str = "cpu",
        threshold: Annotated[float, Field(ge=0, le=1)] = 0.5,
    ) -> None:
        super().__init__(TransformersDetector(path, device, threshold), prompt_file)
