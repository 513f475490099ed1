"""GenEval (Ghosh et al. 2023): does the image hold the objects, counts, colours and positions that the prompt file asks for?

The rules are functions of boxes alone; boxes come from a detector of transformers, or from any function (image) -> boxes.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowgrain.rewards.base import Explained, RewardSource, fields_of

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
APART = 0.1  # share of the two boxes' sizes by which centres must differ to count as apart


@dataclass(frozen=True)
class Box:
    """One detected object: class name, score, x0, y0, x1, y1 in pixels, and its colour if it was asked for."""

    name: str
    score: float
    x0: float
    y0: float
    x1: float
    y1: float
    colour: str | None = None


@dataclass(frozen=True)
class Verdict:
    """Whether everything was right, the share of the demands that was, and what was wrong."""

    correct: bool
    credit: float
    wrong: tuple[str, ...]


def relations(a: Box, b: Box) -> set[str]:
    """How `a` stands to `b`: any of left of, right of, above, below; none if they are not apart."""
    offset = np.array([(a.x0 + a.x1 - b.x0 - b.x1) / 2, (a.y0 + a.y1 - b.y0 - b.y1) / 2])
    size = np.array([a.x1 - a.x0 + b.x1 - b.x0, a.y1 - a.y0 + b.y1 - b.y0])
    apart = np.maximum(np.abs(offset) - APART * size, 0) * np.sign(offset)
    if np.all(np.abs(apart) < 1e-3):
        return set()
    x, y = apart / np.linalg.norm(offset)
    found = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, holds in found.items() if holds}


def judge_boxes(demand: Mapping[str, Any], boxes: Sequence[Box]) -> Verdict:
    """The verdict on an image whose objects are `boxes`, highest score first, for a line of GenEval's prompt file.

    demand has `include`, a list of {class, count, and perhaps color or position: [relation, index of another include]}, and perhaps
    `exclude`, a list of {class, count}: so many are too many. Credit is the share of these demands that is met.
    """
    wrong: list[str] = []
    matched: list[list[Box] | None] = []
    for one in demand.get("include", ()):
        fault, found = _fault(one, demand["include"], boxes, matched)
        matched.append(None if fault else found)
        wrong += [fault] if fault else []
    for one in demand.get("exclude") or ():
        found = [box for box in boxes if box.name == one["class"]]
        if len(found) >= one["count"]:
            wrong.append(f"{one['class']}: {len(found)}, fewer than {one['count']} wanted")
    demands = len(demand.get("include", ())) + len(demand.get("exclude") or ())
    return Verdict(not wrong, 1 - len(wrong) / max(demands, 1), tuple(wrong))


def _fault(
    one: Mapping[str, Any], include: Sequence[Mapping[str, Any]], boxes: Sequence[Box], matched: Sequence[list[Box] | None]
) -> tuple[str | None, list[Box]]:
    """What is wrong with one include, if anything, and the boxes that it takes."""
    name, count = one["class"], one["count"]
    found = [box for box in boxes if box.name == name][:count]
    if len(found) < count:
        return f"{name}: {len(found)} of {count}", found
    if one.get("color") is not None and any(box.colour != one["color"] for box in found):
        return f"{name}: not {one['color']}", found
    if one.get("position") is not None:
        relation, other = one["position"]
        others = matched[other] if other < len(matched) else None
        if others is None or not all(relation in relations(box, there) for box in found for there in others):
            return f"{name}: not {relation} {include[other]['class']}", found
    return None, found


Detector = Callable[[Tensor, Sequence[str]], list[Box]]
"""detector(image [3, H, W] in 0..1, names of the classes whose colour is asked for) -> boxes, highest score first."""


def read_demands(path: Path) -> dict[str, dict[str, Any]]:
    """GenEval's prompt file (JSON lines) by prompt. Raises ValueError naming the line that is none of its kind."""
    demands = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").rstrip("\n").split("\n"), 1):
        try:
            one = json.loads(line)
            demands[one["prompt"]] = one
            if not all(isinstance(part["class"], str) and int(part["count"]) > 0 for part in one["include"]):
                raise ValueError("an include without class or count")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: line {number} is no line of a GenEval file ({error})") from None
    return demands


class GenEval:
    """Share of a prompt's demands that is met, 0..1; by part, whether all are met, for each task as the benchmark reports it.

    Demands come with the prompts, if these are read from GenEval's own file, or from the file that source.model names:
    `DETECTOR` or `DETECTOR#PROMPTS.jsonl`, a detection model of transformers (folder or hub name) and the file. A prompt without
    demands is not scored. Ghosh et al. 2023 (MIT); licence of the weights and input size are the detector's.
    """

    mean_of_parts = True

    def __init__(self, source: RewardSource, *, detector: Detector | None = None) -> None:
        name, _, prompts = (source.model or "").partition("#")
        if prompts and not Path(prompts).is_file():
            raise ValueError(f"reward_models: geneval={source.model}: there is no file {prompts}; write DETECTOR#PROMPTS.jsonl")
        if not name and detector is None:
            raise ValueError(f"reward_models: geneval={source.model} names no detector; write geneval=DETECTOR")
        self.demands = read_demands(Path(prompts)) if prompts else {}
        self.detector = detector or TransformersDetector(name, source.device)

    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores [I], NaN for unknown prompts."""
        return torch.as_tensor(self.explain(images, prompts).scores)

    def explain(self, images: Tensor, prompts: list[str]) -> Explained:
        """The scores, and by task whether the image is right altogether."""
        demands = [fields_of(prompt) if "include" in fields_of(prompt) else self.demands.get(prompt) for prompt in prompts]
        found = [self._judge(image, demand) for image, demand in zip(images, demands, strict=True)]
        tasks = [demand.get("tag", "") if demand is not None else "" for demand in demands]
        parts = {task: torch.full((len(images),), torch.nan) for task in dict.fromkeys(tasks) if task}
        for i, (task, verdict) in enumerate(zip(tasks, found, strict=True)):
            if task and verdict is not None:
                parts[task][i] = float(verdict.correct)
        return Explained(torch.tensor([torch.nan if verdict is None else verdict.credit for verdict in found]), parts)

    def _judge(self, image: Tensor, demand: Mapping[str, Any] | None) -> Verdict | None:
        if demand is None:
            return None
        coloured = [one["class"] for one in demand["include"] if one.get("color") is not None]
        return judge_boxes(demand, self.detector(image, coloured))


class TransformersDetector:
    """Any object detection model of transformers (DETR and its kin); a colour is the nearest of ten in the middle of the box."""

    def __init__(self, name: str, device: str = "cpu", threshold: float = 0.5) -> None:
        from transformers import AutoImageProcessor, AutoModelForObjectDetection

        try:
            self.processor = AutoImageProcessor.from_pretrained(name)
            self.model = AutoModelForObjectDetection.from_pretrained(name).eval().requires_grad_(False).to(device)
        except (OSError, ValueError) as error:
            raise ValueError(f"reward_models: the detector {name} could not be loaded ({error})") from error
        self.device, self.threshold = device, threshold

    @torch.no_grad()
    def __call__(self, image: Tensor, coloured: Sequence[str]) -> list[Box]:
        """Boxes of the image, highest score first."""
        pixels = (image.clamp(0, 1) * 255).byte().cpu()
        given = self.processor(images=pixels.permute(1, 2, 0).numpy(), return_tensors="pt").to(self.device)
        found = self.processor.post_process_object_detection(
            self.model(**given), threshold=self.threshold, target_sizes=[tuple(image.shape[-2:])]
        )[0]
        boxes = []
        for score, label, (x0, y0, x1, y1) in zip(*(found[key].tolist() for key in ("scores", "labels", "boxes")), strict=True):
            name = self.model.config.id2label[label]
            colour = nearest_colour(image, x0, y0, x1, y1) if name in coloured else None
            boxes.append(Box(name, score, x0, y0, x1, y1, colour))
        return sorted(boxes, key=lambda box: -box.score)


_RGB = {
    "red": (0.8, 0.1, 0.1),
    "orange": (0.95, 0.55, 0.1),
    "yellow": (0.95, 0.9, 0.2),
    "green": (0.15, 0.6, 0.2),
    "blue": (0.15, 0.3, 0.85),
    "purple": (0.5, 0.15, 0.6),
    "pink": (0.95, 0.6, 0.75),
    "brown": (0.45, 0.28, 0.12),
    "black": (0.05, 0.05, 0.05),
    "white": (0.95, 0.95, 0.95),
}


def nearest_colour(image: Tensor, x0: float, y0: float, x1: float, y1: float) -> str:
    """The nearest of GenEval's ten colours to the median of the inner half of a box."""
    width, height = x1 - x0, y1 - y0
    inner = image[:, round(y0 + height / 4) : max(round(y1 - height / 4), 1), round(x0 + width / 4) : max(round(x1 - width / 4), 1)]
    middle = inner.flatten(1).median(1).values.cpu().numpy()
    return min(COLOURS, key=lambda name: float(np.square(np.array(_RGB[name]) - middle).sum()))
